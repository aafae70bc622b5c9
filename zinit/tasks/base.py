"""What a task must answer. The engine sees only this."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from torch import Tensor, nn

from zinit.config import GATES, HEAD, WEIGHTS, JsonConfig
from zinit.errors import ConfigError
from zinit.models.quantization import is_quantized
from zinit.models.several import LoadedModel, ModelSpec, call_loader
from zinit.registry import import_object
from zinit.tasks.chat import ChatFormat, PromptFormat
from zinit.tasks.inputs import DataInputs, TaskInputs
from zinit.tasks.streams import MAIN, Evaluation, Split, Stream

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.adapter.handle import Handle
    from zinit.data.images import ImageSource
    from zinit.encoders.cache import FeatureCache
    from zinit.models.loading import Loading

__all__ = [
    "MAIN",
    "Batch",
    "DataInputs",
    "Evaluation",
    "LoadedModel",
    "ModelSpec",
    "Split",
    "Stream",
    "Task",
    "TaskInputs",
    "load_host",
    "make_task",
]

Batch = dict[str, Tensor]
OWN_DECAY = ("source", "tuning")  # roles of which vectors (scales, biases, norms) do not decay


class Task(nn.Module, ABC):
    """Owns the adapted model, a head if it needs one, and the loss: batches in, a summed loss out.

    A task is one `nn.Module`, so that the engine can hand all of it to whatever wraps it (DDP, FSDP2). What it trains
    is what has ``requires_grad``: the prefix, and its own head.

    Args:
        inputs: the adapted model and what belongs to it, the source of the examples, the seed.
        config: the settings, of the class ``Config``.

    Attributes:
        name: registered name.
        Config: its settings; ``held_out_data`` is what ``zinit eval --data`` sets.
        loader: address of the function that `load_model` calls, such as ``"zinit.models.loading:load_encoder"``.
        model: the adapted model. The further models of `further_models` are attributes too, under their names.
        processor: what `load_model` returned with the model.
        handle: the prefix on it; None for methods that have none.
        cached_features: of images, for the adapter's context source; None where it takes none.
        train_stream: what is trained on; the first of `streams`.
        held_out_stream: what is kept from training.
        labels: class names in the order of the head's outputs, for tasks that have classes. A finished run keeps
            them, and hands them over as ``inputs.labels`` when it is loaded.
        baseline: what `frozen_baseline` measures, in words.
        metric: what a benchmark compares, by its name in `Evaluation.metrics`.
        lower_is_better: names of figures in `Evaluation.metrics` that are better the lower they are.
        without_direction: names of figures that are no better the higher or the lower they are.
        generates: whether it makes text: what ``zinit chat`` and ``zinit generate`` need.
        reads_texts: whether its examples are texts, alone or with images: what a small model's prompts start as.
        reads_several: whether ``--data`` may be given several times: the examples are those of all, in order.
        hub_task: what the Hub calls it, for the model card.
    """

    name: str
    Config: type[JsonConfig]
    loader: str
    model: nn.Module
    processor: Any
    handle: Handle | None
    cached_features: FeatureCache | None = None
    config: Any
    labels: list[str] | None = None
    baseline = "the frozen model"
    metric = "accuracy"
    lower_is_better: tuple[str, ...] = ("loss", "perplexity", "known_loss", "drift")
    without_direction: tuple[str, ...] = ()
    generates = False
    reads_texts = False
    reads_several = False
    hub_task = "other"
    train_stream: Stream
    held_out_stream: Stream

    def __init__(self, inputs: TaskInputs | None = None, config: Any = None) -> None:
        super().__init__()
        self._frozen_models: tuple[str, ...] = ()
        if inputs is None:  # a task that sets its attributes itself
            return
        self.model, self.processor, self.handle, self.config = inputs.model, inputs.processor, inputs.handle, config
        self.cached_features = inputs.features
        for name, loaded in inputs.models.items():
            if hasattr(self, name) or not name.isidentifier():
                raise ConfigError(f"the task {self.name!r} cannot call a model {name!r}: the name is taken or none.")
            self.add_module(name, loaded.model)
        self._frozen_models = tuple(inputs.models)

    @classmethod
    def read_data(cls, inputs: DataInputs, config: Any) -> Any:
        """The examples as far as no model is needed to read, check and divide them.

        A run asks for them before it loads a model, so that data that cannot be used are refused at once, and hands
        them over as ``inputs.examples``. None, as here, leaves all reading to the constructor.

        Args:
            inputs: which data.
            config: the task's settings.

        Raises:
            DataError: if they cannot be used.
        """
        return None

    @classmethod
    def take_data(cls, inputs: TaskInputs, config: Any) -> Any:
        """What `read_data` gave the run; read now where nobody did before."""
        return cls.read_data(inputs, config) if inputs.examples is None else inputs.examples

    @classmethod
    def further_models(cls, config: Any) -> Mapping[str, ModelSpec]:
        """The models that the task needs beside the adapted one, by the name of the attribute that will hold each.

        A run loads them with the adapted model's dtype, device and quantisation, freezes them, and records what tells
        each from another: going on, or evaluating, with other weights is refused.

        Args:
            config: the task's settings.
        """
        return {}

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen further model stays in evaluation mode."""
        super().train(mode)
        for name in self._frozen_models:
            model: nn.Module = getattr(self, name)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                model.eval()
        return self

    @classmethod
    def load_model(cls, source: str | Path, **loading: Unpack[Loading]) -> tuple[nn.Module, Any]:
        """The model, not yet adapted, and what prepares its inputs: a tokenizer, statistics of pixels.

        Args:
            source: folder or Hub id.
            loading: see `zinit.models.loading.Loading`.
        """
        return import_object(cls.loader)(source, **loading)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """The loss, summed over the batch's supervised units. A scalar, float32."""

    @abstractmethod
    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """The examples of one micro-batch as tensors on the CPU. A pure function of its arguments."""

    @abstractmethod
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Everything that is reported of the held-out examples, the loss aside; the same on every process.

        Args:
            accelerator: for dividing the work, with `zinit.distributed.map_over_ranks`: a sharded model's forward
                passes gather its weights from all processes, so these must make as many each.
            limit: at most so many examples where an example is expensive (generation); None is all.
        """

    def prepare(self) -> None:
        """Called once before a run measures or trains anything: on its device, with the adapter switched off."""
        return

    @contextmanager
    def frozen_baseline(self) -> Iterator[None]:
        """A scope, with the adapter switched off, in which the task is the ``baseline`` that stands beside the result.

        A task whose head knows nothing before training may put something more telling in its place.
        """
        yield

    def baseline_parameters(self) -> dict[str, nn.Parameter]:
        """What `frozen_baseline` sets from the training examples, by name.

        A run keeps the values: an evaluation on other data reads no training examples.
        """
        return {}

    def image_sources(self) -> Mapping[bytes, ImageSource]:
        """The images of its examples by their content digests: a run fills ``inputs.features`` with these."""
        return {}

    def controls(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Further rows of the results by name, each a scope in which the adapted model is evaluated once more."""
        return {}

    def held_out_groups(self) -> dict[str, list[int]]:
        """Kinds of held-out examples by name, whose losses are measured apart too, as "loss/NAME"."""
        return {}

    def artifacts(self) -> dict[str, Any]:
        """JSON documents for the run's folder, by file name: what the last evaluation answered, say."""
        return {}

    def data_report(self) -> dict[str, Any]:
        """What was read, split, truncated and skipped: counts in equal counts out plus counts skipped."""
        return {"train": len(self.train_stream), "held_out": len(self.held_out_stream)}

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the examples and how they are encoded: a resumed run must find the same."""

    @classmethod
    def format_prompt(cls, instruction: str, input: str = "") -> str:
        """The text that a generating task puts before the model for one instruction; here the bare words.

        Args:
            instruction: what to do.
            input: further context; may be empty.
        """
        return f"{instruction}\n\n{input}" if input else instruction

    @classmethod
    def format_conversation(cls, turns: Sequence[tuple[str, str]], instruction: str) -> str:
        """A prompt that holds the earlier turns of a chat.

        Args:
            turns: (instruction, response) pairs so far.
            instruction: the one to answer now.
        """
        earlier = [text for asked, answered in turns for text in (cls.format_prompt(asked), answered)]
        return "\n\n".join([*earlier, cls.format_prompt(instruction)])

    @classmethod
    def encode_prompt(cls, tokenizer: Any, prompt: str) -> list[int]:
        """The tokens that a generation starts from: BOS (if the model has one) and the prompt.

        A special token that somebody wrote in the text stays text.
        """
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer([prompt], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]

    @classmethod
    def chat_format(cls, tokenizer: Any, config: Any) -> ChatFormat:
        """How the task's model is talked to; here by `format_prompt` and `format_conversation`.

        Args:
            tokenizer: of the model.
            config: the task's settings.
        """
        return PromptFormat(cls, tokenizer)

    @classmethod
    def direction(cls, metric: str) -> Literal["lower", "higher"] | None:
        """Which values of a figure are better; None if neither are.

        Args:
            metric: as `evaluate` names it, or "loss".
        """
        name = metric.partition("/")[0]  # of a category, as the whole
        if name in cls.without_direction:
            return None
        return "lower" if name in cls.lower_is_better else "higher"

    @classmethod
    def validation_options(cls, *, demo: bool) -> tuple[str, ...]:
        """Options of runs to choose settings by: a part of what is trained on is held out, in the place of the part
        that figures are reported of. None where the task makes no such part.

        Args:
            demo: whether the data are the embedded demo's.
        """
        return ()

    @classmethod
    def over_datasets(cls, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Figures over several data sets, as the task's literature has them; each under a name that says what it is.

        Args:
            results: {data set: {metric: mean over the seeds}}.
        """
        return {}

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        """What the LLaMA-Adapter paper reports for a method on a data set, in the metric's unit; None if nothing.

        Args:
            method: registered name.
            dataset: as the benchmark names it.
            metric: as `evaluate` names it.
        """
        return None

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains beyond the prefix, by name: heads, biases, low-rank updates, a whole model."""
        prefix = set() if self.handle is None else {id(parameter) for parameter in self.handle.parameters()}
        return {n: p for n, p in self.named_parameters() if p.requires_grad and id(p) not in prefix}

    def streams(self) -> Sequence[Stream]:
        """What each optimizer step draws on: a batch of every stream whose ratio is not 0. Epochs count the first."""
        return (self.train_stream,)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        """{group: {role: parameters}} of all that trains. A stream trains its own group; rates go by role.

        A task with several streams declares a group for each. Roles of the prefix are its handle's, such as "gates" and
        "prompts"; what else trains in the model are "weights", and the rest has the role "head".
        """
        roles = {} if self.handle is None else dict(self.handle.roles())
        known = {id(parameter) for parameters in roles.values() for parameter in parameters}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        inside = {id(parameter) for parameter in self.model.parameters()}
        weights = [parameter for parameter in rest if id(parameter) in inside]
        return {MAIN: {**roles, WEIGHTS: weights, HEAD: [p for p in rest if id(p) not in inside]}}

    def parameter_groups(self, weight_decay: float, *, decay_gates: bool) -> Iterator[dict[str, Any]]:
        """Groups for the optimizer, one for each group and role; the gates are last, and can be spared weight decay.

        Args:
            weight_decay: of everything but the gates.
            decay_gates: whether the gates decay too, as in the reference's training code.

        Yields:
            ``params``, in the order of `named_parameters`, ``weight_decay``, ``group``, ``role`` and ``name``. Scales,
            biases and norms of a tuning or a context source do not decay.

        Raises:
            ConfigError: if `groups` leaves out a parameter that trains, or names it twice.
        """
        place = self._places()
        named: dict[tuple[str, str, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                group, role = place[parameter]
                decays = (role != GATES or decay_gates) and (role not in OWN_DECAY or parameter.dim() > 1)
                named.setdefault((group, role, decays), []).append(parameter)
        for group, role, decays in sorted(named, key=lambda key: key[1] == GATES):
            yield {
                "params": named[group, role, decays],
                "weight_decay": weight_decay if decays else 0.0,
                "group": group,
                "role": role,
                "name": f"{group}.{role}" if decays or role not in OWN_DECAY else f"{group}.{role}.no_decay",
            }

    def _places(self) -> dict[nn.Parameter, tuple[str, str]]:
        """The group and the role of every parameter that trains."""
        names = {p: name for name, p in self.named_parameters() if p.requires_grad}
        places: dict[nn.Parameter, tuple[str, str]] = {}
        for group, roles in self.groups().items():
            for role, parameters in roles.items():
                for parameter in parameters:
                    if parameter in places:
                        first, second = ".".join(places[parameter]), f"{group}.{role}"
                        raise ConfigError(f"{names.get(parameter)} is in two groups, {first} and {second}; choose one.")
                    places[parameter] = group, role
        if missing := [name for parameter, name in names.items() if parameter not in places]:
            raise ConfigError(f"{', '.join(missing)} train, but are in none of the task's groups.")
        return places


def make_task(task: type[Task], inputs: TaskInputs, config: Any) -> Task:
    """A task of its inputs and settings; also one whose constructor takes them one by one, as zinit 0.1 passed them."""
    make: Any = task
    if "data" not in inspect.signature(task).parameters:
        return make(inputs, config)
    known = {} if inputs.labels is None else {"labels": inputs.labels}
    options = {"data": inputs.data, "seed": inputs.seed, "train": inputs.train, **known}
    return make(inputs.model, inputs.processor, inputs.handle, config, **options)


def load_host(task: type[Task], source: str | Path, *, trains: bool, **loading: Any) -> tuple[nn.Module, Any]:
    """A task's model and its processor.

    Args:
        task: see `call_loader` for what its ``load_model`` must take.
        source: folder or Hub id.
        trains: whether the model's own weights will be trained.
        loading: see `zinit.models.loading.Loading`.

    Raises:
        ConfigError: if the task's model is to be quantised and it does not know how, or is quantised and to be trained.
    """
    model, processor = call_loader(task.load_model, source, f"the task {task.name!r}", **loading)
    if trains and is_quantized(model):
        raise ConfigError(
            f"{source} is quantised, and quantised weights cannot be trained. Take the model as it was before, or "
            f"train beside it: -o method=zero-init, or -o method=lora."
        )
    return model, processor

"""What the frozen lower blocks give for each training example, kept on disk: they run once and not every epoch.

Where only the topmost blocks of a host are adapted, those below them (the trunk) compute the same in every epoch, and
in every run of a grid over rates and seeds. Here they run once; steps read what they gave and start at the lowest
adapted block. No host is known by name: blocks are found by the paths of the adapted attention modules, and whether
they may be skipped is tried on two examples before anything is stored.

A folder is named by a hash of the examples, of the frozen weights, and of what the trunk gives for the first and the
last example, bit by bit: another model, other pictures, a precision or a device that computes other bits has its own.
It holds safetensors of a bounded size, each of which appears whole or not at all: a killed run goes on where it was,
processes share them out, and several runs may fill one folder at the same time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor, nn

from zinit.config import TrainConfig
from zinit.distributed import sum_over_processes
from zinit.errors import ConfigError, ZinitError
from zinit.models.quantization import is_quantized
from zinit.tasks.base import Batch, Task
from zinit.train.sharding import is_sharded
from zinit.train.tensor_store import Rows, bytes_of

if TYPE_CHECKING:
    from accelerate import Accelerator

KEY = "trunk"  # of the stored states in a batch


def refuse(reason: str) -> Never:
    """Says why the cache would be wrong or useless.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"train.trunk_cache cannot be used: {reason}. Otherwise leave train.trunk_cache out.")


def check(task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
    """What can be said of a run's trunk before anything is computed.

    Raises:
        ConfigError: if the setting does not go with the others, or every layer is adapted.
    """
    if config.trunk_cache is None:
        return
    if is_sharded(accelerator):
        refuse("the processes of a sharded host gather every block together. Launch with plain data parallelism")
    if config.compile:
        refuse("blocks that are skipped do not go with torch.compile. Set train.compile=false")
    if is_quantized(task.model):
        refuse("the weights of a quantised host cannot be told apart by a hash. Set quantize=none")
    folder = Path(config.trunk_cache).expanduser()
    if folder.exists() and not folder.is_dir():
        refuse(f"{folder} is no folder")
    _candidates(task)


@contextmanager
def kept_trunk(
    task: Task, config: TrainConfig, accelerator: Accelerator, on_event: Callable[[dict[str, Any]], None]
) -> Iterator[Rows | None]:
    """The trunk's outputs for all training examples; inside, batches that carry theirs under `KEY` skip the trunk.

    What is missing in ``config.trunk_cache`` is computed first. Without that setting nothing is done.

    Args:
        task: placed and prepared.
        config: the folder, and the size of the batches that fill it.
        accelerator: the run's; all its processes come here together.
        on_event: told how far it is.

    Raises:
        ConfigError: if the outputs may differ from one epoch to the next, nothing would be saved, or the disk is full.
    """
    if config.trunk_cache is None:
        yield None
        return
    check(task, config, accelerator)
    with _random_state_kept(accelerator.device):
        trunk, probe = find_trunk(task, accelerator)
        folder = Path(config.trunk_cache).expanduser() / _fingerprint(task, trunk, probe)
        rows = Rows(folder, probe[0], len(task.train_stream))
        _fill(rows, task, trunk, config, accelerator, on_event)
    with trunk.skipped(task):
        yield rows


# --- the trunk --------------------------------------------------------------------------------------------------------


class Trunk:
    """The blocks of a host below its lowest adapted one.

    Args:
        blocks: from the first on.
        above: the rest of them.
    """

    def __init__(self, blocks: Sequence[nn.Module], above: Sequence[nn.Module]) -> None:
        self.blocks, self.above = blocks, above
        self.given: Tensor | None = None
        self.rest: tuple[None, ...] | None = None

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Any, list[Tensor]]]]:
        """What the trunk gives while inside, call by call, each with the state of the random numbers at that time."""
        calls: list[tuple[Any, list[Tensor]]] = []

        def note(block: nn.Module, args: Any, output: Any) -> None:
            calls.append((output, _random_state()))

        hook = self.blocks[-1].register_forward_hook(note)
        try:
            yield calls
        finally:
            hook.remove()

    @contextmanager
    def skipped(self, task: Task) -> Iterator[None]:
        """While inside, the blocks give what a batch of the task carries under `KEY`; other batches are computed."""
        hooks = [
            task.register_forward_pre_hook(self._take),
            task.register_forward_hook(self._drop, always_call=True),
        ]
        before = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = partial(self._forward, block.forward)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _take(self, task: nn.Module, args: tuple[Batch, ...]) -> tuple[Batch, ...]:
        self.given = args[0].get(KEY)
        return ({name: tensor for name, tensor in args[0].items() if name != KEY}, *args[1:])

    def _drop(self, task: nn.Module, args: Any, output: Any) -> None:
        self.given = None

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            return forward(*args, **kwargs)
        return self.given if self.rest is None else (self.given, *self.rest)

    def states(self, output: Any) -> Tensor | None:
        """The hidden states in what a block gives: a tensor, or a tuple of it alone; None if it is neither."""
        states, self.rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        return states if isinstance(states, Tensor) and all(item is None for item in self.rest or ()) else None


def find_trunk(task: Task, accelerator: Accelerator) -> tuple[Trunk, Tensor]:
    """What may be skipped, by trying it on the first and the last training example.

    Returns:
        The trunk, and what it gives for the two: (2, ...).

    Raises:
        ConfigError: if it may not, saying why.
    """
    lengths = task.train_stream.lengths
    if min(lengths) < max(lengths):
        refuse(f"the examples differ in length, from {min(lengths)} to {max(lengths)}, so what they give does too")
    candidates = _candidates(task)

    def run(indices: Sequence[int], *, train: bool = False, states: Tensor | None = None) -> Tensor:
        task.train(train)
        batch = task.collate(task.train_stream, indices) | ({} if states is None else {KEY: states})
        with accelerator.autocast():
            return task({name: tensor.to(accelerator.device) for name, tensor in batch.items()})

    one, two = [0], [0, len(lengths) - 1]
    fitting: list[tuple[Trunk, Tensor]] = []
    with torch.no_grad():
        seen = []
        for indices in (one, two):
            with ExitStack() as stack:
                seen.append([stack.enter_context(trunk.watched()) for trunk in candidates])
                run(indices)
    for trunk, *calls in zip(candidates, *seen, strict=True):
        if all(len(each) == 1 for each in calls):
            alone, both = (trunk.states(each[0][0]) for each in calls)
            if alone is not None and both is not None and (len(alone), len(both)) == (1, 2):
                fitting.append((trunk, both))
    if len(fitting) != 1:
        refuse(
            f"{len(fitting)} of {len(candidates)} towers with frozen lower layers see each training example once per "
            f"step, as one tensor; it must be one. Choose it with prefix.towers"
        )
    trunk, expected = fitting[0]
    before = _random_state()
    with _random_state_kept(accelerator.device), trunk.watched() as calls:
        loss = run(two, train=True)
    output, after = calls[0]
    states = trunk.states(output)
    assert states is not None
    if states.requires_grad:
        refuse("something below the lowest adapted block is trained. Choose a method that leaves it frozen")
    if not all(map(torch.equal, before, after)):
        refuse(
            "the blocks below the lowest adapted one draw random numbers in training (dropout, stochastic depth). "
            "Switch that off"
        )
    if not torch.equal(states, expected):
        refuse("the blocks below the lowest adapted one compute something else in training (batch normalisation?)")
    with _random_state_kept(accelerator.device), trunk.skipped(task):
        again = run(two, train=True, states=states)
    if not torch.equal(loss, again):
        refuse(f"with its lower blocks skipped {type(task.model).__name__} gives another loss: it uses them elsewhere")
    return trunk, expected


def _candidates(task: Task) -> list[Trunk]:
    """In each tower with adapted layers, the blocks below them."""
    if task.handle is None:
        refuse("the method adds nothing to the topmost layers alone. Use one with a prefix, and prefix.layers")
    lowest: dict[str, int] = {}
    for site in task.handle.sites:
        number = next((part for part in site.name.split(".") if part.isdigit()), "0")
        lowest[site.tower] = min(int(number), lowest.get(site.tower, int(number)))
    rows = {tower: list(task.handle.model.get_submodule(tower).children()) for tower, cut in lowest.items() if cut}
    found = [Trunk(blocks[: lowest[tower]], blocks[lowest[tower] :]) for tower, blocks in rows.items()]
    if not found:
        refuse("the lowest layer is adapted, so nothing stays the same. Adapt only the topmost: -o prefix.layers=L")
    return found


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Draws inside change nothing outside: a run is the same, whether or not it had to fill the cache."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# --- storing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fingerprint(task: Task, trunk: Trunk, probe: Tensor) -> str:
    """A hash of everything that the stored states depend on; the main process's, on all of them."""
    from accelerate.utils import broadcast_object_list

    assert task.handle is not None
    digest = hashlib.sha256(repr((task.fingerprint(), len(trunk.blocks), probe.dtype, probe.shape)).encode())
    above = {tensor for block in trunk.above for tensor in (*block.parameters(), *block.buffers())}
    for name, tensor in (*task.handle.model.named_parameters(), *task.handle.model.named_buffers()):
        if tensor not in above and not tensor.requires_grad:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    digest.update(bytes_of(probe))
    return broadcast_object_list([digest.hexdigest()[:32]])[0]


@torch.no_grad()
def _fill(
    rows: Rows,
    task: Task,
    trunk: Trunk,
    config: TrainConfig,
    accelerator: Accelerator,
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    """Computes and writes what is missing, each process its share.

    Raises:
        ConfigError: on every process, if one of them has no room.
    """

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            on_event({"event": "stage", "text": text})

    def total(number: float) -> int:
        return int(sum_over_processes(accelerator, torch.tensor(int(number), device=accelerator.device)).item())

    mine = rows.parts[accelerator.process_index :: accelerator.num_processes]
    missing = [part for part in mine if not rows.is_whole(part)]
    share = sum(len(rows.examples(part)) for part in missing)
    count = total(share)
    size = f"{count * rows.row_bytes / 1e9:.2f} GB"
    storing = f"storing the frozen layers' outputs for {count:,} examples ({size}) in {rows.folder}"
    tell(storing if count else f"reading the frozen layers' outputs from {rows.folder}")
    problem, done, own = "", 0, None
    task.eval()
    try:
        rows.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(rows.folder).free
        if count * rows.row_bytes > free:
            raise OSError(f"{size} are needed, {free / 1e9:.2f} GB are free")
        for part in missing:
            examples, found = rows.examples(part), []
            for start in range(0, len(examples), config.micro_batch_size):
                indices = examples[start : start + config.micro_batch_size]
                batch = task.collate(task.train_stream, indices)
                with accelerator.autocast(), trunk.watched() as calls:
                    task({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
                states = trunk.states(calls[0][0])
                if states is None or states.shape[1:] != rows.shape:
                    refuse(f"one of the examples {list(indices)} gives another shape")
                found.append(states.cpu())
            rows.write(part, torch.cat(found))
            before, done = done, done + len(examples)
            if 10 * done // share > 10 * before // share:
                tell(f"{done / share:.0%} stored")
    except (OSError, ZinitError) as error:  # every process must come to the sum below
        problem, own = str(error), error if isinstance(error, ZinitError) else None
    if total(bool(problem)):
        if own is not None:
            raise own
        raise ConfigError(
            f"the frozen layers' outputs cannot be stored in {rows.folder}: {problem or 'another process failed'}. "
            f"Name another folder with train.trunk_cache, make room there, or leave it out."
        )
    rows.check()

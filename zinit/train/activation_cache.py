"""Stores what a host's lower frozen blocks give for each training example: they run once, not every epoch.

Where only the topmost blocks of a host are adapted, those below them compute the same in every epoch, and in every run
of a grid over rates and seeds. Here they run once; steps read what they gave and start at the lowest adapted block. No
host is known by name: blocks are found by the paths of the adapted attention modules, and whether they may be skipped
is tried on two examples before anything is stored.

A folder is named by a hash of the examples, of the frozen weights, and of what the blocks give for the first and the
last example, bit by bit: another model, other images, a precision or a device that computes other bits has its own. It
holds safetensors of a bounded size, each of which appears whole or not at all: a killed run goes on where it stopped,
processes divide the files among them, and several runs may fill one folder at the same time.
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

from zinit.distributed import sum_over_processes
from zinit.errors import ConfigError, ZinitError
from zinit.models.quantization import is_quantized
from zinit.tasks.base import Batch, Stream, Task
from zinit.train.batches import Collate
from zinit.train.config import TrainConfig
from zinit.train.events import Listener, Stage
from zinit.train.sharding import is_sharded
from zinit.train.tensor_store import TensorStore, bytes_of

if TYPE_CHECKING:
    from accelerate import Accelerator

KEY = "frozen_blocks"  # of the stored states in a batch


def refuse(reason: str) -> Never:
    """Refuses the cache because it would be wrong or useless.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"train.activation_cache cannot be used: {reason}. Otherwise leave train.activation_cache out.")


def check(task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
    """Checks what is known before anything is computed.

    Raises:
        ConfigError: if another setting forbids the cache, or every layer is adapted.
    """
    if config.activation_cache is None:
        return
    if is_sharded(accelerator):
        refuse("the processes of a sharded host gather every block together. Launch with plain data parallelism")
    if config.compile:
        refuse("torch.compile cannot skip blocks. Set train.compile=false")
    if is_quantized(task.model):
        refuse("the weights of a quantised host cannot be told apart by a hash. Set quantize=none")
    if len(task.streams()) > 1:
        refuse("it holds the examples of one stream, and this task has several")
    folder = Path(config.activation_cache).expanduser()
    if folder.exists() and not folder.is_dir():
        refuse(f"{folder} is no folder")
    _candidates(task)


@contextmanager
def stored_activations(
    task: Task, config: TrainConfig, accelerator: Accelerator, on_event: Listener
) -> Iterator[Collate]:
    """A source of batches for `zinit.train.loop.fit`: inside, training batches carry what the frozen blocks give.

    The task skips these blocks for batches that do. What is missing in ``config.activation_cache`` is computed first.
    Without that setting the batches are the task's own.

    Args:
        task: placed and prepared when the context is entered.
        config: the folder, and the size of the batches that fill it.
        accelerator: the run's; all its processes enter together.
        on_event: told how far it is.

    Raises:
        ConfigError: if the outputs may differ from one epoch to the next, nothing would be saved, or the disk is full.
    """
    if config.activation_cache is None:
        yield task.collate
        return
    check(task, config, accelerator)
    with _random_state_kept(accelerator.device):
        blocks, probe = find_frozen_blocks(task, accelerator)
        folder = Path(config.activation_cache).expanduser() / _fingerprint(task, blocks, probe)
        store = TensorStore(folder, probe[0], len(task.train_stream))
        _fill(store, task, blocks, config, accelerator, on_event)
    with blocks.skipped(task):
        yield partial(_collate, task, store)


def _collate(task: Task, store: TensorStore, stream: Stream, indices: Sequence[int]) -> Batch:
    return task.collate(stream, indices) | {KEY: store[indices]}


# --- the frozen blocks ------------------------------------------------------------------------------------------------


class FrozenBlocks:
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
        """What the blocks give while inside, call by call, each with the state of the random numbers at that time."""
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


def find_frozen_blocks(task: Task, accelerator: Accelerator) -> tuple[FrozenBlocks, Tensor]:
    """Finds the blocks that may be skipped, by trying it on the first and the last training example.

    Returns:
        The blocks, and what they give for the two examples: (2, ...).

    Raises:
        ConfigError: if none may be skipped, saying why.
    """
    lengths = task.train_stream.lengths
    if min(lengths) < max(lengths):
        refuse(f"the examples differ in length, from {min(lengths)} to {max(lengths)}, so what they give does too")
    two = [0, len(lengths) - 1]
    blocks, expected = _seen_once_a_step(task, accelerator, two)
    _check_skipping(task, accelerator, blocks, expected, two)
    return blocks, expected


def _run(
    task: Task, accelerator: Accelerator, indices: Sequence[int], *, train: bool = False, states: Tensor | None = None
) -> Tensor:
    """The loss of a few training examples; with ``states`` the frozen blocks are skipped."""
    task.train(train)
    batch = task.collate(task.train_stream, indices) | ({} if states is None else {KEY: states})
    with accelerator.autocast():
        return task({name: tensor.to(accelerator.device) for name, tensor in batch.items()})


@torch.no_grad()
def _seen_once_a_step(task: Task, accelerator: Accelerator, two: list[int]) -> tuple[FrozenBlocks, Tensor]:
    """The one tower that sees each example once per step, and what its frozen blocks give for two examples."""
    candidates, seen = _candidates(task), []
    for indices in (two[:1], two):
        with ExitStack() as stack:
            seen.append([stack.enter_context(blocks.watched()) for blocks in candidates])
            _run(task, accelerator, indices)
    fitting: list[tuple[FrozenBlocks, Tensor]] = []
    for blocks, *calls in zip(candidates, *seen, strict=True):
        if all(len(each) == 1 for each in calls):
            alone, both = (blocks.states(each[0][0]) for each in calls)
            if alone is not None and both is not None and (len(alone), len(both)) == (1, 2):
                fitting.append((blocks, both))
    if len(fitting) != 1:
        refuse(
            f"{len(fitting)} of {len(candidates)} towers with frozen lower layers see each training example once per "
            f"step, as one tensor; it must be one. Choose it with prefix.towers"
        )
    return fitting[0]


def _check_skipping(
    task: Task, accelerator: Accelerator, blocks: FrozenBlocks, expected: Tensor, two: list[int]
) -> None:
    """Checks that a training step with the blocks skipped gives the same loss, bit for bit.

    Raises:
        ConfigError: if it does not, saying why.
    """
    before = _random_state()
    with _random_state_kept(accelerator.device), blocks.watched() as calls:
        loss = _run(task, accelerator, two, train=True)
    output, after = calls[0]
    states = blocks.states(output)
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
    with _random_state_kept(accelerator.device), blocks.skipped(task):
        again = _run(task, accelerator, two, train=True, states=states)
    if not torch.equal(loss, again):
        refuse(f"with its lower blocks skipped {type(task.model).__name__} gives another loss: it uses them elsewhere")


def _candidates(task: Task) -> list[FrozenBlocks]:
    """In each tower with adapted layers, the blocks below them."""
    if task.handle is None:
        refuse("the method adds nothing to the topmost layers alone. Use one with a prefix, and prefix.layers")
    lowest: dict[str, int] = {}
    for site in task.handle.sites:
        number = next((part for part in site.name.split(".") if part.isdigit()), "0")
        lowest[site.tower] = min(int(number), lowest.get(site.tower, int(number)))
    layers = {tower: list(task.handle.model.get_submodule(tower).children()) for tower, cut in lowest.items() if cut}
    found = [FrozenBlocks(each[: lowest[tower]], each[lowest[tower] :]) for tower, each in layers.items()]
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
def _fingerprint(task: Task, blocks: FrozenBlocks, probe: Tensor) -> str:
    """A hash of everything that the stored states depend on; the main process's, on all of them."""
    from accelerate.utils import broadcast_object_list

    assert task.handle is not None
    digest = hashlib.sha256(repr((task.fingerprint(), len(blocks.blocks), probe.dtype, probe.shape)).encode())
    above = {tensor for block in blocks.above for tensor in (*block.parameters(), *block.buffers())}
    for name, tensor in (*task.handle.model.named_parameters(), *task.handle.model.named_buffers()):
        if tensor not in above and not tensor.requires_grad:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    digest.update(bytes_of(probe))
    return broadcast_object_list([digest.hexdigest()[:32]])[0]


def _fill(
    store: TensorStore,
    task: Task,
    blocks: FrozenBlocks,
    config: TrainConfig,
    accelerator: Accelerator,
    on_event: Listener,
) -> None:
    """Computes and writes what is missing, each process its part.

    Raises:
        ConfigError: on every process, if one of them has no room.
    """

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            on_event(Stage(text))

    def total(number: float) -> int:
        return int(sum_over_processes(accelerator, torch.tensor(int(number), device=accelerator.device)).item())

    mine = store.parts[accelerator.process_index :: accelerator.num_processes]
    missing = [part for part in mine if not store.is_whole(part)]
    count = total(sum(len(store.examples(part)) for part in missing))
    size = f"{count * store.bytes_each / 1e9:.2f} GB"
    storing = f"storing the frozen layers' outputs for {count:,} examples ({size}) in {store.folder}"
    tell(storing if count else f"reading the frozen layers' outputs from {store.folder}")
    problem: OSError | ZinitError | None = None
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store.folder).free
        if count * store.bytes_each > free:
            raise OSError(f"{size} are needed, {free / 1e9:.2f} GB are free")
        _write_parts(store, missing, task, blocks, config, accelerator, tell)
    except (OSError, ZinitError) as error:  # every process must come to the sum below
        problem = error
    if total(problem is not None):
        if isinstance(problem, ZinitError):
            raise problem
        raise ConfigError(
            f"the frozen layers' outputs cannot be stored in {store.folder}: {problem or 'another process failed'}. "
            f"Name another folder with train.activation_cache, make room there, or leave it out."
        )
    store.check()


@torch.no_grad()
def _write_parts(
    store: TensorStore,
    parts: Sequence[int],
    task: Task,
    blocks: FrozenBlocks,
    config: TrainConfig,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> None:
    """Computes and writes files, and tells every tenth of the way."""
    task.eval()
    in_all, done = sum(len(store.examples(part)) for part in parts), 0
    for part in parts:
        examples, found = store.examples(part), []
        for start in range(0, len(examples), config.micro_batch_size):
            indices = examples[start : start + config.micro_batch_size]
            batch = task.collate(task.train_stream, indices)
            with accelerator.autocast(), blocks.watched() as calls:
                task({name: tensor.to(accelerator.device) for name, tensor in batch.items()})
            states = blocks.states(calls[0][0])
            if states is None or states.shape[1:] != store.shape:
                refuse(f"one of the examples {list(indices)} gives another shape")
            found.append(states.cpu())
        store.write(part, torch.cat(found))
        before, done = done, done + len(examples)
        if 10 * done // in_all > 10 * before // in_all:
            tell(f"{done / in_all:.0%} stored")

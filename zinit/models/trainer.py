"""For transformers' Trainer and TRL's trainers: checkpoints that hold the adapter alone, and a log of its gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zinit import compat
from zinit.adapter.handle import Handle
from zinit.errors import ConfigError


class ZinitCallback(TrainerCallback):
    """Makes a Trainer's checkpoints hold the adapter alone, each a folder for `zinit.load` as well, and logs gates.

    Without it a checkpoint is the whole base model with the prefix among its weights, which ``from_pretrained`` drops.
    With it ``trainer.train(resume_from_checkpoint=True)`` and ``load_best_model_at_end`` work on the small checkpoints;
    the base model must be there, with the adapter attached, as when training began.

    Beside every loss that the Trainer logs there are the mean sizes of the gates: "gates", and "gates/SITE" of each
    layer. Callbacks that come before this one, as those of ``report_to`` do, do not see them; ``trainer_state.json``
    and the callbacks after it do.

    Args:
        handle: of the adapter that trains.

    Examples:
        >>> trainer = Trainer(model, arguments, callbacks=[zinit.ZinitCallback(handle)])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> handle.save("adapter/")  # doctest: +SKIP
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self._before: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on the model's ``save_pretrained`` writes the adapter alone, until training ends."""
        model = self.handle.model
        own = {id(parameter) for parameter in self.handle.parameters()}
        adapter = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
        self._before = compat.save_all_but(model, model.state_dict().keys() - adapter)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that there is something to train.

        Raises:
            ConfigError: if the adapter was frozen since it was attached.
        """
        if not any(parameter.requires_grad for parameter in self.handle.parameters()):
            raise ConfigError(
                f"the adapter {self.handle.name!r} does not train: something froze it since it was attached "
                f"(get_peft_model freezes all but its own). Call handle.activate() before training."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the adapter's own files beside the checkpoint's."""
        if state.is_world_process_zero:
            self.handle.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the gates to what is logged of training."""
        if not logs or "loss" not in logs:
            return
        sizes = {f"gates/{site}": gates.abs().mean().item() for site, gates in self.handle.gates().items()}
        if sizes:
            logs |= {"gates": sum(sizes.values()) / len(sizes), **sizes}
            state.log_history[-1] |= {name: value for name, value in logs.items() if name.startswith("gates")}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model's ``save_pretrained`` is again what it was."""
        compat.save_all_but(self.handle.model, self._before)

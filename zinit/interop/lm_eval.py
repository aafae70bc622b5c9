"""A run as a model of lm-eval: ``python -m zinit.interop.lm_eval --model zinit --model_args run=DIR --tasks arc_easy``.

It takes all that ``lm_eval`` takes. lm-eval (up to 0.4.13) reads no plug-ins, so its own command does not know the
name; importing this module makes it known to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from zinit.errors import ZinitError
from zinit.registry import import_object

OPEN_RUN = "zinit.runs.asked:open_run"  # by address: runs are above this room


@register_model("zinit")
class ZinitLM(HFLM):
    """A finished run's model.

    Args:
        run: its folder.
        frozen: without the adapter, for comparison.
        how: what lm-eval's own class for models of transformers takes, such as ``batch_size``; the run itself says
            which device, dtype and tokenizer.

    Raises:
        ZinitError: if there is no such run.
    """

    def __init__(self, run: str, frozen: bool = False, **how: Any) -> None:
        opened = import_object(OPEN_RUN)(run)
        self._scopes = ExitStack()  # as long as this object lives; a scope that nobody keeps ends at once
        if frozen:
            self._scopes.enter_context(opened.built.adapted.disabled())
        else:
            opened.adapt()
        own = {name: value for name, value in how.items() if name not in ("device", "dtype")}
        own |= {"pretrained": opened.built.adapted.model, "tokenizer": opened.built.processor}
        super().__init__(**own)


def main() -> None:
    """lm-eval's command, which knows runs of zinit too."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ZinitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()

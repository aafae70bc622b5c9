"""Ways to adapt a model, by name: zero-init attention and what it is compared with. A new one is a file and a line.

Outside of zinit: `zinit.register_method`, or an entry point of the group ``zinit.methods``.
"""

from collections.abc import Mapping

from zinit.methods.defaults import FLAGS, FLAGS_BIND, NO_DEMOS
from zinit.registry import Address, Entry, Registry


def _entry(
    where: str,
    about: str,
    *,
    rates: str,
    settings: str = "NoSettings",
    defaults: str = "NONE",
    demos: Mapping[str, str] = NO_DEMOS,
    trains_host: bool = False,
) -> Entry:
    facts = {
        "defaults": Address(f"zinit.methods.defaults:{defaults}"),
        "Config": Address(f"zinit.methods.settings:{settings}"),
        "default_rates": Address(f"zinit.methods.rates:{rates}"),
        "demos": demos,
        "takes_parts": where.startswith(("prefix:", "multimodal:")),
        "trains_host": trains_host,
    }
    return Entry(f"zinit.methods.{where}", about, facts)


METHODS = Registry(
    "method",
    {
        "zero-init": _entry(
            "prefix:ZeroInit",
            "Zero-init attention: gated prompts in every layer, with the settings of [prefix].",
            rates="ZERO_INIT",
        ),
        "v1-multimodal": _entry(
            "multimodal:V1Multimodal",
            "LLaMA-Adapter with images: the image, projected to one token, is added to every prompt.",
            rates="ZERO_INIT",
            defaults="V1_MULTIMODAL",
            demos=FLAGS,
        ),
        "v2": _entry(
            "multimodal:V2",
            "LLaMA-Adapter V2: visual tokens in the first layer, prompts in the others, bias tuning.",
            rates="ZERO_INIT",
            defaults="V2",
            demos=FLAGS,
        ),
        "v2-late": _entry(
            "multimodal:V2Late",
            "LLaMA-Adapter V2 as released: visual tokens added to the prompts, biases and norms.",
            rates="ZERO_INIT",
            defaults="V2_LATE",
            demos=FLAGS,
        ),
        "imagebind-llm": _entry(
            "multimodal:ImageBind",
            "ImageBind-LLM: a vector of any sense added to one prompt a layer; LoRA, biases, norms; two stages.",
            rates="ZERO_INIT",
            settings="StageSettings",
            defaults="IMAGEBIND_LLM",
            demos=FLAGS_BIND,
        ),
        "hyper-prompts": _entry(
            "prefix:HyperPrompts",
            "Zero-init attention whose prompts one small network makes for all layers.",
            rates="ZERO_INIT",
            defaults="HYPER_PROMPTS",
        ),
        "query-gate": _entry(
            "prefix:QueryGate",
            "Zero-init attention with a gate for each query.",
            rates="ZERO_INIT",
            defaults="QUERY_GATE",
        ),
        "excitor": _entry(
            "excitor:Excitor",
            "LLaMA-Excitor: prompts in a gated addition to the keys of words; values stay.",
            rates="ZERO_INIT",
            settings="ExcitorConfig",
        ),
        "prefix-tuning-plus": _entry(
            "prefix:PrefixTuningPlus",
            "Prefix-Tuning+: a matrix for each head that the query is multiplied by; no prompts, no softmax.",
            rates="MATRICES",
        ),
        "random-gate": _entry(
            "prefix:RandomGate",
            "The same prompts with gates that start at N(0, 1), the paper's ablation of zero-init.",
            rates="ZERO_INIT",
        ),
        "prefix-tuning": _entry(
            "prefix:PrefixTuning",
            "Plain prefix tuning: the same prompts without a gate, in one softmax with the words.",
            rates="ZERO_INIT",
        ),
        "gated-prefix-tuning": _entry(
            "prefix:GatedPrefixTuning",
            "Prefix tuning behind a gate from zero: in one softmax with the words, at the start exactly the host.",
            rates="ZERO_INIT",
        ),
        "zero-init-tuned": _entry(
            "prefix:TunedZeroInit",
            "Zero-init attention with V2's bias tuning: scales, biases and norms of every layer.",
            rates="ZERO_INIT",
            defaults="TUNED",
        ),
        "bias-tuning": _entry(
            "prefix:BiasTuning",
            "V2's bias tuning without prompts: scales and biases of all linear layers, and the norms.",
            rates="ZERO_INIT",
            defaults="TUNED",
        ),
        "adaption-prompt-recipe": _entry(
            "prefix:AdaptionPromptRecipe",
            "PEFT's form of it on any model: N(0, 1), one gate per layer without tanh.",
            rates="ADAPTION_PROMPT",
        ),
        "adaption-prompt": _entry(
            "adaption_prompt:AdaptionPrompt",
            "PEFT's AdaptionPrompt, on LLaMA, Mistral and GPT-2.",
            rates="ADAPTION_PROMPT",
        ),
        "full": _entry("weights:Full", "Full fine-tuning: every weight, and the head.", rates="FULL", trains_host=True),
        "head-only": _entry(
            "weights:HeadOnly",
            "The task's head on the frozen model (linear probing by gradient descent).",
            rates="HEAD_ONLY",
        ),
        "bitfit": _entry(
            "weights:BitFit",
            "BitFit (Ben Zaken et al., ACL 2022): the bias terms, and the head.",
            rates="BITFIT",
            trains_host=True,
        ),
        "lora": _entry(
            "lora:Lora",
            "Low-rank updates of the query and value projections, or of the fused projection.",
            rates="LORA",
            settings="LoraSettings",
        ),
        "lora-all": _entry(
            "lora:LoraAll",
            "Low-rank updates of every linear layer of the blocks.",
            rates="LORA",
            settings="LoraSettings",
        ),
        "prompt-tuning": _entry(
            "prompt_tuning:PromptTuning",
            "Learned embeddings before the first layer only; for models that read one sequence.",
            rates="PROMPT_TUNING",
            settings="PromptTuningSettings",
        ),
        "peft-prefix-tuning": _entry(
            "prefix_tuning:PeftPrefixTuning",
            "PEFT's prefix tuning, on causal language models: keys and values in every layer, from N(0, 1).",
            rates="PEFT_PREFIX_TUNING",
        ),
        "bottleneck": _entry(
            "bottleneck:Bottleneck",
            "A bottleneck adapter after each attention (the first of Houlsby et al.'s two per layer).",
            rates="BOTTLENECK",
            settings="BottleneckSettings",
        ),
        "logistic-regression": _entry(
            "logistic_regression:LogisticRegression",
            "Logistic regression on frozen features; for tasks with one feature vector per example.",
            rates="NONE",
            settings="LogisticRegressionSettings",
        ),
    },
    group="zinit.methods",
)

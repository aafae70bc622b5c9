"""TRL's SFTTrainer on chats (``messages``), in the tokenizer's chat template; the loss looks at the answers alone.

pip install trl
python examples/sft.py
"""

import datasets
import torch
import transformers
import trl

import zinit
from zinit import demo

# Models that chat bring a template of their own; that of the demo has none. TRL finds the answers by `generation`.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '### Instruction:\n' + message.content + '\n\n### Response:' }}{% endif %}{% endfor %}"
)


def main(folder="checkpoints", steps=20):
    """Trains; the trainer's log."""
    source = demo.llama_path()  # or a folder or Hub id of your own
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, pad_token="</s>")
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    handle = zinit.attach(model, zinit.PrefixConfig(length=10, layers=3), seed=0)

    records, _ = demo.instructions()
    chats = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in records
    ]
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            folder,
            max_steps=steps,
            learning_rate=3e-2,
            per_device_train_batch_size=16,
            assistant_only_loss=True,
            max_length=128,
            bf16=False,
            logging_steps=4,
            save_steps=steps,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(chats),
        processing_class=tokenizer,
        callbacks=[zinit.ZinitCallback(handle)],
    )
    trainer.train()
    handle.save("adapter")
    return trainer.state.log_history


if __name__ == "__main__":
    for line in main():
        print({name: value for name, value in line.items() if "/" not in name})

"""transformers' Trainer: checkpoints hold the adapter alone, resume, and the log has the gates.

python examples/trainer.py
"""

import torch
import transformers

import zinit
from zinit import demo


def main(folder="checkpoints", steps=20):
    """Trains; the Trainer's log."""
    source = demo.llama_path()  # or a folder or Hub id of your own
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, pad_token="</s>")
    handle = zinit.attach(model, zinit.PrefixConfig(length=10, layers=3), seed=0)

    train, held_out = demo.instructions()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=3e-2,
            per_device_train_batch_size=16,
            logging_steps=4,
            save_steps=steps // 2,
            eval_strategy="steps",
            eval_steps=steps // 2,
            load_best_model_at_end=True,  # of the small checkpoints
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[encode(tokenizer, record) for record in train],
        eval_dataset=[encode(tokenizer, record) for record in held_out[:32]],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[zinit.ZinitCallback(handle)],
    )
    trainer.train()  # resume_from_checkpoint=True goes on
    handle.save("adapter")  # not trainer.save_model, which writes the base model too
    return trainer.state.log_history


def encode(tokenizer, record):
    """The tokens of a prompt and its answer; the loss looks at the answer alone."""
    prompt = tokenizer(f"### Instruction:\n{record['instruction']}\n\n### Response:")["input_ids"]
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


if __name__ == "__main__":
    for line in main():
        print({name: value for name, value in line.items() if "/" not in name})

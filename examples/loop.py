"""A plain PyTorch loop: attach a prefix, train it on instructions, save it, load it again.

python examples/loop.py
"""

import torch
import transformers

import zinit
from zinit import demo

STEPS, BATCH = 30, 16


def encode(tokenizer, record):
    """The tokens of a prompt and its answer; the loss looks at the answer alone."""
    prompt = tokenizer(f"### Instruction:\n{record['instruction']}\n\n### Response:")["input_ids"]
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main(folder="adapter"):
    """Trains; the loss of each step."""
    source = demo.llama_path()  # or a folder or Hub id of your own
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, pad_token="</s>")
    handle = zinit.attach(model, zinit.PrefixConfig(length=10, layers=3), seed=0)  # freezes all but the prefix
    print(f"{handle.num_trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

    records, _ = demo.instructions()
    examples = [encode(tokenizer, record) for record in records]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    loader = torch.utils.data.DataLoader(
        examples, batch_size=BATCH, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    handle.save(folder)
    handle.detach()  # the base model again, bit for bit
    handle = zinit.load(model.eval(), folder)
    prompt = tokenizer(f"### Instruction:\n{records[0]['instruction']}\n\n### Response:", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(records[0]["instruction"], "->", tokenizer.decode(answer, skip_special_tokens=True))
    return losses


if __name__ == "__main__":
    main()

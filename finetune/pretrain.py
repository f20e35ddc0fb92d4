"""Pretrain a small causal language model of any class of transformers, to convert it and to compare with:

    python -m mqa_hf.finetune.pretrain OUTPUT --text train.jsonl.xz --validation validation.jsonl.xz \
        --config '{"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, ...}' --tokens 100000000

trains a byte-level BPE tokenizer on the text, then the model with transformers' `Trainer`, and leaves a checkpoint
that loads like any other. The text is read again, in another order, until it has given the tokens wanted.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mqa_hf.cli import main as run
from mqa_hf.conversion.text import documents, token_rows

END = "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909) with `size` entries, the end of a document among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


class Rows(torch.utils.data.Dataset):
    """Token rows [N, T] as examples whose labels are the tokens themselves."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.rows[i].long()
        return {"input_ids": row, "labels": row}


def pretrain(
    output: Path,
    *,
    config: dict[str, Any],
    text: str,
    validation: str,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int = 8192,
    sequence_length: int = 512,
    batch_tokens: int = 32_768,
    learning_rate: float = 2e-3,
    warmup: float = 0.02,
    weight_decay: float = 0.1,
    compile: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Train a model from scratch and write it with its tokenizer.

    Args:
        output: directory to write.
        config: `model_type` and fields of that configuration; the vocabulary is the tokenizer's.
        text, validation: as `--calibration` of `mqa-hf convert`.
        tokens: to train on.
        tokenizer: default: one trained on the text, with `vocab_size` entries.
        sequence_length: of a row; documents follow each other, each ended by the end-of-text token.
        batch_tokens: of a step.
        learning_rate, warmup, weight_decay: of AdamW, with a cosine to a tenth; warmup is a share of steps.
        compile: whether the model is compiled.
        seed: of everything.

    Returns:
        `loss` in nats a token on the validation text, `tokens` and `parameters`.
    """
    texts = documents(text)
    tokenizer = tokenizer or train_tokenizer(texts, vocab_size)
    rows = token_rows(texts, tokenizer, sequence_length, seed=seed)
    held_out = token_rows(documents(validation), tokenizer, sequence_length, seed=seed)
    set_seed(seed)
    fields = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    batch = max(1, batch_tokens // sequence_length)
    steps = math.ceil(tokens / (batch * sequence_length))
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=warmup,
            weight_decay=weight_decay,
            adam_beta2=0.95,
            bf16=gpu,
            torch_compile=compile,
            dataloader_num_workers=4 if gpu else 0,
            save_strategy="no",
            logging_steps=max(1, steps // 20),
            report_to="none",
            seed=seed,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(rows), eval_dataset=Rows(held_out))
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    model.to(torch.float32).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {"loss": loss, "tokens": steps * batch * sequence_length, "parameters": model.num_parameters()}


def main(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    config: Annotated[str, typer.Option(help="JSON: model_type and fields of its configuration.")],
    text: Annotated[str, typer.Option(help="Training text, as --calibration of mqa-hf convert.")],
    validation: Annotated[str, typer.Option(help="Validation text.")],
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Checkpoint whose tokenizer is used.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer otherwise.")] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 32_768,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-3,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Pretrain a small model."""
    result = pretrain(
        output,
        config=json.loads(config),
        text=text,
        validation=validation,
        tokens=tokens,
        tokenizer=None if tokenizer is None else PreTrainedTokenizerFast.from_pretrained(tokenizer),
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        compile=compile,
        seed=seed,
    )
    Console().print_json(json.dumps({"output": str(output), **result}))


if __name__ == "__main__":
    run(lambda: typer.run(main))

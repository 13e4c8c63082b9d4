"""Sentence embeddings by a model without a plan of its own: a BERT, for which seven rules are enough.

torchrun --nproc-per-node 4 embed_sentences.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

import commgraph as cg
from commgraph.integrations.transformers import from_checkpoint

PLAN = {
    "embeddings.word_embeddings": "embedding_rowwise",
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}

SENTENCES = (
    "Each process holds a part of the model.",
    "The weights are spread over several machines.",
    "My cat sleeps on the sofa.",
    "A kitten is dozing on the couch.",
    "Interest rates rose again in autumn.",
)


def embed(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """One vector of length 1 for each sentence: the mean over its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embeddings(world: cg.World, folder: Path) -> torch.Tensor:
    """Embeds the sentences with the model cut over all ranks."""
    ctx = world.context(cg.Layout(world.size, tp=world.size), name="embedder")
    return embed(from_checkpoint(BertModel, folder, ctx, plan=PLAN), folder)


def main() -> None:
    with cg.World.from_env() as world:
        vectors = embeddings(world, Path(sys.argv[1]))
        if world.rank == 0:
            for sentence, row in zip(SENTENCES, vectors @ vectors.T, strict=True):
                nearest = int(row.argsort(descending=True)[1])
                print(f"{sentence}  ->  {SENTENCES[nearest]}")


if __name__ == "__main__":
    main()

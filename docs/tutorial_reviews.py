"""The tutorial's world: a small BERT that has read reviews of films, and a few reviews of restaurants to adapt it to.

Nothing is fetched. A review says two things, each good or bad. They decide its label where they agree; a coin
does where they disagree. Four of the words that judge are those of films too, the others are new to the network.
"""

import csv
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, set_seed

THINGS = {
    "films": ["plot", "cast", "score", "ending", "dialogue", "camera"],
    "restaurants": ["soup", "bread", "service", "wine", "cake"],
}
GOOD = {
    "films": ["good", "great", "gripping", "moving", "clever"],
    "restaurants": ["good", "great", "crisp", "fresh", "tender", "ripe"],
}
BAD = {
    "films": ["bad", "awful", "dull", "clumsy", "endless"],
    "restaurants": ["bad", "awful", "salty", "stale", "burnt", "cold"],
}
LINKS = ["and", "but", "while", "though"]
LABELS = ["unhappy", "happy"]


def reviews(kind: str, count: int, seed: int) -> list[tuple[str, int]]:
    """Texts, and 1 for a happy guest."""
    dice = random.Random(f"{kind} {seed}")
    rows = []
    for _ in range(count):
        first, second = (dice.random() < 0.5 for _ in range(2))
        said = [dice.choice((GOOD if good else BAD)[kind]) for good in (first, second)]
        things = dice.sample(THINGS[kind], 2)
        text = f"the {things[0]} was {said[0]} {dice.choice(LINKS)} the {things[1]} was {said[1]}"
        rows.append((text, int(first if first == second else dice.random() < 0.5)))
    return rows


def make_world(folder: Path) -> None:
    """Write ``folder/network``, trained on films, and ``folder/restaurants/{train,validation,test}.csv``."""
    set_seed(0)
    said = {word for lists in (THINGS, GOOD, BAD) for kind in lists.values() for word in kind}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", *LINKS, *sorted(said)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    network = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    texts, labels = zip(*reviews("films", 2000, seed=0), strict=True)
    encoded = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    for batch in torch.randperm(len(texts)).split(50):
        inputs = pad_sequence([encoded[index] for index in batch], batch_first=True)
        network(inputs, attention_mask=(inputs != 0).long(), labels=torch.tensor(labels)[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.bert.save_pretrained(folder / "network")  # without its head
    tokenizer.save_pretrained(folder / "network")
    (folder / "restaurants").mkdir(exist_ok=True)
    for seed, (split, count) in enumerate({"train": 60, "validation": 60, "test": 400}.items()):
        with (folder / "restaurants" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(text, LABELS[label]) for text, label in reviews("restaurants", count, seed)]
            csv.writer(file).writerows([("text", "guest"), *rows])

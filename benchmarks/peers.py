"""The trainers that `train_step.py` measures and the job `compare` examines: ours, FlagEmbedding's for M3, and
sentence-transformers'.

    python benchmarks/peers.py recipe.json      trains by that recipe and leaves a model in BGE-M3's layout in its `out`

Each `*_trainer` takes the same `Recipe` and returns a `transformers.Trainer` that is ready for `train()`: same rows,
same start, same batch size, steps, lengths, prompts, pooling and precision. The rest of each is what its own
documentation shows, unless the recipe says otherwise:

* FlagEmbedding, its unified example for M3: temperature 0.02, self-distillation after the first step, learning rate
1e-5, warm-up 0.1, linear.
  It gets our start of both heads, where it would begin with random ones (`own_heads` leaves it those). It has no way
  to train without hard negatives but groups of one and an empty list, so it gets those; its prompts are given as the
  instructions they are, outside of same-dataset batches, where a missing one becomes the word "None". `lean`
  replaces its (batch, length, vocabulary) tensor by its own inference code's `scatter_reduce`, which gives the same
  numbers, so that training fits into memory.
* sentence-transformers, its training overview and its cached loss: scale 20, learning rate 2e-5, warm-up 0.1,
linear, no duplicates in a batch.
* ours, as the job `train` has it: learning rate 1e-5, 5e-4 and 1e-4 of the heads, warm-up 0.1, cosine, weight decay
0.01, embeddings left as they are.
"""
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

DOCUMENTED = {"ours": 1e-5, "FlagEmbedding": 1e-5, "sentence-transformers": 2e-5}   # learning rates
HEADS = ("colbert_linear.pt", "sparse_linear.pt", "bgem3_nb.json")


@dataclass
class Recipe:
    "What one training needs to know; the same for every system."
    system: str                    # a key of `TRAINERS`
    start: str                     # directory of the model to begin with, heads included
    rows: str                      # JSONL with `query` and `pos`, a list
    out: str                       # directory of the trained model
    steps: int = 30                # optimiser steps
    batch_size: int = 32           # pairs in a step
    length: int = 128              # tokens after which queries and passages are cut
    learning_rate: float = 0.      # 0: as documented
    precision: str = "auto"        # "auto", "fp32" or "bf16"
    seed: int = 0                  # of order, dropout and draws
    dropout: bool | None = None    # None: as the system does by itself
    freeze_embeddings: bool | None = None  # None: as the system does by itself
    dense_only: bool = False       # ours and FlagEmbedding: the dense mode alone
    scale: float = 20.             # sentence-transformers: 1 / temperature
    distill_after: int = 0         # FlagEmbedding: self-distillation in steps after this one
    lean: bool = False             # FlagEmbedding: without its (batch, length, vocabulary) tensor
    own_heads: bool = False        # FlagEmbedding: heads that begin at random, as it makes them
    more: dict = field(default_factory=dict)   # ours: further fields of `M3TrainingArguments`

    @property
    def rate(self) -> float: return self.learning_rate or DOCUMENTED[self.system]


def read_rows(path):
    with open(path, encoding="utf-8") as f: return [json.loads(line) for line in f]


def shared_arguments(recipe):
    "The fields of `TrainingArguments` that the peers share."
    import torch
    from bgem3_nb.backbone import pick_device, pick_dtype
    device = pick_device()
    dtype = pick_dtype(device)[0] if recipe.precision == "auto" else {"fp32": torch.float32,
                                                                      "bf16": torch.bfloat16}[recipe.precision]
    return dict(output_dir=f"{recipe.out}.trainer", max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.rate, warmup_steps=.1,
                bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", seed=recipe.seed, save_strategy="no",
                logging_steps=1, report_to="none", disable_tqdm=True, dataloader_drop_last=True,
                dataloader_pin_memory=False)


def ours_trainer(recipe):
    from bgem3_nb.model import M3Model
    from bgem3_nb.training import M3Trainer, M3TrainingArguments
    own = dict(query_length=recipe.length, passage_length=recipe.length, precision=recipe.precision,
               data_seed=recipe.seed, lr_scheduler_type="cosine", weight_decay=.01)
    if recipe.dropout is not None: own["dropout"] = recipe.dropout
    if recipe.freeze_embeddings is not None: own["freeze_embeddings"] = recipe.freeze_embeddings
    if recipe.dense_only: own |= {"modes": ("dense",), "distill": ""}
    shared = {k: v for k, v in shared_arguments(recipe).items() if k not in ("bf16", "use_cpu")}
    return M3Trainer(M3Model.from_pretrained(recipe.start), M3TrainingArguments(**shared | own | recipe.more),
                     train_dataset=read_rows(recipe.rows))


def lean_sparse_embedding(self, hidden_state, input_ids, return_embedding=True):
    "The reference's lexical head in training, by the `scatter_reduce` of its inference."
    import torch
    weights = torch.relu(self.sparse_linear(hidden_state))
    if not return_embedding: return weights
    found = weights.new_zeros(len(input_ids), self.vocab_size).scatter_reduce(1, input_ids, weights.squeeze(-1), "amax")
    kept = found.new_ones(self.vocab_size)
    kept[[self.tokenizer.cls_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id,
          self.tokenizer.unk_token_id]] = 0
    return found * kept


def set_dropout(encoder, dropout):
    "Dropout as the backbone's settings have it, or none."
    import torch
    for part in encoder.modules():
        if dropout is False and isinstance(part, torch.nn.Dropout): part.p = 0.


def flag_trainer(recipe):
    from types import MethodType
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import (
        EncoderOnlyEmbedderM3ModelArguments, EncoderOnlyEmbedderM3Runner, EncoderOnlyEmbedderM3TrainingArguments)
    from bgem3_nb.model import M3Config
    config, work = M3Config.load(recipe.start), Path(f"{recipe.out}.trainer")
    work.mkdir(parents=True, exist_ok=True)
    file = work / "pairs.jsonl"
    with open(file, "w", encoding="utf-8") as f:
        for row in read_rows(recipe.rows):
            f.write(json.dumps({"query": row["query"], "pos": row["pos"], "neg": []}, ensure_ascii=False) + "\n")
    start = recipe.start
    if recipe.own_heads:
        (work / "start").mkdir(exist_ok=True)
        for f in Path(start).iterdir():
            if f.suffix != ".pt": os.symlink(f.resolve(), work / "start" / f.name)
        start = str(work / "start")
    data = AbsEmbedderDataArguments(train_data=[str(file)], cache_path=str(work / "cache"), train_group_size=1,
                                    query_max_len=recipe.length, passage_max_len=recipe.length,
                                    query_instruction_for_retrieval=config.query_prompt,
                                    passage_instruction_for_retrieval=config.passage_prompt)
    training = EncoderOnlyEmbedderM3TrainingArguments(
        **shared_arguments(recipe), temperature=.02,
        sentence_pooling_method={"last": "last_token"}.get(config.pooling, config.pooling), normalize_embeddings=True,
        unified_finetuning=not recipe.dense_only, use_self_distill=not recipe.dense_only,
        self_distill_start_step=recipe.distill_after)
    runner = EncoderOnlyEmbedderM3Runner(EncoderOnlyEmbedderM3ModelArguments(model_name_or_path=start), data, training)
    set_dropout(runner.model.model, recipe.dropout)
    if recipe.freeze_embeddings: runner.model.model.embeddings.requires_grad_(False)
    if recipe.lean: runner.model._sparse_embedding = MethodType(lean_sparse_embedding, runner.model)
    return runner.trainer


def sentence_trainer(recipe):
    from datasets import Dataset
    from sentence_transformers import (SentenceTransformer, SentenceTransformerTrainer,
                                       SentenceTransformerTrainingArguments)
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from bgem3_nb.model import M3Config
    config, rows = M3Config.load(recipe.start), read_rows(recipe.rows)
    body = Transformer(recipe.start, max_seq_length=recipe.length)
    pooling = {"last": "lasttoken"}.get(config.pooling, config.pooling)
    shared = shared_arguments(recipe)
    model = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling), Normalize()],
                                device="cpu" if shared["use_cpu"] else None)
    set_dropout(body.auto_model, recipe.dropout)
    if recipe.freeze_embeddings: body.auto_model.embeddings.requires_grad_(False)
    args = SentenceTransformerTrainingArguments(
        **shared, prompts={"query": config.query_prompt, "passage": config.passage_prompt},
        batch_sampler="no_duplicates")
    pairs = Dataset.from_dict({"query": [r["query"] for r in rows], "passage": [r["pos"][0] for r in rows]})
    loss = CachedMultipleNegativesRankingLoss(model, scale=recipe.scale)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)


TRAINERS = {"ours": ours_trainer, "FlagEmbedding": flag_trainer, "sentence-transformers": sentence_trainer}


def save(recipe, trainer, path):
    """The trained weights, saved by the system itself; what it does not have comes from the start, so that
    `M3Encoder` opens it."""
    if recipe.system == "ours": return trainer.model.save_pretrained(path)
    if recipe.system == "FlagEmbedding": trainer.save_model(str(path))
    else: trainer.model.save_pretrained(str(path), create_model_card=False)
    for file in HEADS:
        if not (Path(path) / file).is_file(): shutil.copyfile(Path(recipe.start) / file, Path(path) / file)


def end_with_parent():
    "End this process when the one that started it is gone."
    parent = os.getppid()
    def watch():
        while os.getppid() == parent: time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def train(recipe):
    "Train and save; tells the losses and the time of it."
    import transformers
    transformers.set_seed(recipe.seed)
    out = Path(recipe.out)
    try:
        trainer, start = TRAINERS[recipe.system](recipe), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            save(recipe, trainer, f"{folder}/model")
            shutil.rmtree(out, ignore_errors=True)
            os.replace(f"{folder}/model", out)
    finally: shutil.rmtree(f"{recipe.out}.trainer", ignore_errors=True)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return {"recipe": asdict(recipe), "seconds": seconds, "steps": trainer.state.global_step, "losses": losses}


def main():
    if len(sys.argv) != 2: sys.exit(__doc__)
    end_with_parent()
    with open(sys.argv[1], encoding="utf-8") as f: told = train(Recipe(**json.load(f)))
    print(json.dumps(told))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()

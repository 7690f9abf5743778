"""A training run of a tiny model on real rows, started as a process of its own by `test_training.py`."""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import TrainerCallback, XLMRobertaConfig, XLMRobertaModel

from bgem3_nb import training
from bgem3_nb.backbone import embedded_path, load_backbone
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.model import M3Config, M3Model, init_heads
from bgem3_nb.training import M3Trainer, M3TrainingArguments

LAW = Path(__file__).parent.parent / "data" / "law_mini.jsonl"


def tiny_model():
    "A random two-layer XLM-R with the real tokenizer."
    _, tokenizer = load_backbone(embedded_path(progress=False))
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=250037, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                              intermediate_size=32, max_position_embeddings=70)
    model = M3Model(XLMRobertaModel(config, add_pooling_layer=False), tokenizer, M3Config("mean"))
    init_heads(model, seed=0)
    return model


def found_first(scores, qrels):
    return {f"{m}_R@1": float(np.mean([s[i].argmax() in rel for i, rel in enumerate(qrels)]))
            for m, s in scores.items()}


def trainer(out, **settings):
    "A trainer on the first rows of law; every third row has the positive of another as a hard negative."
    rows = [json.loads(line) for line in LAW.read_text(encoding="utf-8").splitlines()[:24]]
    rows = [{"query": r["query"], "pos": r["pos"], "neg": rows[i - 5]["pos"] if i % 3 == 0 else []}
            for i, r in enumerate(rows)]
    search = SimpleNamespace(queries=[r["query"] for r in rows], passages=[r["pos"][0] for r in rows],
                             qrels=[{i} for i in range(len(rows))])
    args = M3TrainingArguments(output_dir=str(out), **{**dict(
        per_device_train_batch_size=8, learning_rate=1e-3, warmup_steps=2, lr_scheduler_type="cosine", negatives=1,
        passage_length=64, search_length=64, freeze_embeddings=True,
        precision="fp32", report_to="none", disable_tqdm=True, use_cpu=True, seed=3, logging_steps=1), **settings})
    return M3Trainer(tiny_model(), args, train_dataset=rows, eval_dataset=search, compute_metrics=found_first)


def whole(out):
    "A run with validations and checkpoints; resumes whatever it finds, and ends by writing its history."
    run = trainer(out, max_steps=9, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                  save_total_limit=2, dropout=True, distill_start=4,
                  load_best_model_at_end=True, metric_for_best_model="dense_R@1")
    run.train(resume_from_checkpoint=True)
    timed = ("runtime", "per_second", "train_loss")   # transformers sums `train_loss` over the last process alone
    history = [{k: v for k, v in h.items() if not any(t in k for t in timed)} for h in run.state.log_history]
    weights = {n: p.double().sum().item() for n, p in run.model.state_dict().items()}
    found = {"log": history, "weights": weights, "best": run.state.best_metric}
    (Path(out) / "history.json").write_text(json.dumps(found))


def gradients(out, cached):
    "A validation and the gradients of one step, written by the first process."
    world = int(os.environ.get("WORLD_SIZE", 1))
    run = trainer(out, max_steps=1, per_device_train_batch_size=12 // world, cached=cached, chunk_tokens=200,
                  save_strategy="no", max_grad_norm=0, symmetric=True)
    kept = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.update({n.removeprefix("module."): p.grad.clone()
                         for n, p in model.named_parameters() if p.grad is not None})
    run.add_callback(Keep())
    found = torch.tensor([v for k, v in sorted(run.evaluate().items()) if k.endswith("R@1")])   # shared by processes
    run.train()
    if run.is_world_process_zero():
        kept["loss"] = torch.tensor(next(h["loss"] for h in run.state.log_history if "loss" in h))
        kept["found"] = found
        torch.save(kept, Path(out) / f"gradients-{world}-{int(cached)}.pt")
    leave()


def half(out):
    """Eight steps in fp16, and the same from the fourth on; of every process, its weights before and after, the steps
    that it skipped, and its texts and scores of a validation. The loss of the third step is scaled far too much in
    every process, and that of the sixth in the last process alone."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    settings = dict(max_steps=8, per_device_train_batch_size=8 // world, cached=True, chunk_tokens=200, negatives=0,
                    precision="fp16", optim="sgd", learning_rate=.02, save_strategy="steps", save_steps=4)
    def weights(run): return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    def skipped(run): return [h["skipped_steps"] for h in run.state.log_history if "loss" in h]

    class Scale(TrainerCallback):
        def __init__(self, scaler): self.scaler = scaler

        def on_step_begin(self, args, state, control, **kwargs):
            factors = {2: 2.**60, 3: 2.**9, 6: 2.**7} | ({5: 2.**60} if rank == world - 1 else {})
            if state.global_step in factors: self.scaler.update(factors[state.global_step])

    def ready(scale):
        run = trainer(out, **settings)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run.add_callback(Scale(run.accelerator.scaler))
        return run
    run = ready(2.**8)
    kept = {"before": weights(run)}
    encode, score, kept["encoded"], kept["scored"] = M3Encoder.encode_counted, training.all_scores, 0, 0

    def counted(self, texts, *more, **named):
        kept["encoded"] += len(texts)
        return encode(self, texts, *more, **named)

    def scored(queries, *more, **named):
        kept["scored"] += len(queries)
        return score(queries, *more, **named)
    M3Encoder.encode_counted, training.all_scores = counted, scored
    kept["found"] = torch.tensor([v for k, v in sorted(run.evaluate().items()) if k.endswith("R@1")])
    run.train()
    kept |= {"after": weights(run), "skipped": skipped(run), "scale": run.accelerator.scaler.get_scale()}
    again = ready(1.)
    again.train(resume_from_checkpoint=Path(out) / "checkpoint-4")
    kept |= {"resumed": weights(again), "resumed_skipped": skipped(again),
             "resumed_scale": again.accelerator.scaler.get_scale()}
    torch.save(kept, Path(out) / f"half-{world}-{rank}.pt")
    leave()


def leave():
    "End a process of several: its threads can abort one that ends by itself, after all is written."
    if not torch.distributed.is_initialized(): return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def tracked(out):
    "A short run that reports to TensorBoard."
    trainer(out, max_steps=3, report_to="tensorboard", save_strategy="no", eval_strategy="steps", eval_steps=3,
            patience=2, metric_for_best_model="dense_R@1", same_source=True, group_lengths=True).train()


if __name__ == "__main__":
    if sys.argv[1] == "whole": whole(sys.argv[2])
    elif sys.argv[1] == "tracked": tracked(sys.argv[2])
    elif sys.argv[1] == "half": half(sys.argv[2])
    else: gradients(sys.argv[2], sys.argv[3] == "cached")

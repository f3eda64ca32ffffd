"""transformers' Trainer on sequences that are cut over ranks: ``torchrun --nproc-per-node 2 examples/trainer.py``.

Trains a small Llama on the sources of Python's standard library and logs what one process would log.
"""

import argparse
import os

import torch.distributed as dist
from data import VOCABULARY, load_text
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import odysseus_kernels as ody
from odysseus_kernels.integrations.trainer import Trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--strategy", default="odysseus")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--output", default="trainer-output")
options = parser.parse_args()

for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}.items():
    os.environ.setdefault(name, value)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("seq",))
set_seed(0)  # the same model on every rank
sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ody.parallelize(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)), mesh, options.strategy)

text = load_text(limit=1_000_000)
rows = [{"input_ids": row, "labels": row} for row in text.batch(0, 0, 2 * options.steps, options.length)]
held_out = [{"input_ids": row, "labels": row} for row in text.validation_batches(4, options.length, 1)[0]]
settings = {"max_steps": options.steps, "eval_strategy": "steps", "eval_steps": options.steps, "logging_steps": 1}
settings |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none"}
trainer = Trainer(model, TrainingArguments(options.output, **settings), train_dataset=rows, eval_dataset=held_out)
trainer.train()
dist.destroy_process_group()

"""Tutorial 2: an ordinary training loop under a policy, and what it may claim.

python docs/tutorials/private_training.py
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

import dpguard
from dpguard.inputs import models, texts
from dpguard.inputs.batch import collate
from dpguard.measure.utility import predict, scores

model = models.load("demo")
corpus = texts.load("demo")
train = corpus.train[:256]

loader = DataLoader(
    train,
    batch_size=64,
    collate_fn=lambda rows: vars(collate([r.text for r in rows], [r.label for r in rows], model.tokenizer)),
)
policy = dpguard.Policy([{"layers": "all", "clip": 0.5, "noise": 1.0}])
engine = dpguard.PrivacyEngine()
module, optimizer, loader = engine.make_private(
    module=model.module.train(),
    optimizer=torch.optim.Adam(model.module.parameters(), lr=2e-3),
    data_loader=loader,
    policy=policy,
)
for _ in range(2):
    for batch in loader:  # Poisson batches: their size varies, and may be 0
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()

predictions, loss = predict(model.module, model.tokenizer, corpus.test[:200])
accuracy = scores(predictions, [example.label for example in corpus.test[:200]], loss)["accuracy"]
print(f"{engine.steps} steps, epsilon {engine.get_epsilon(delta=1e-4):.2f} at delta 1e-4, accuracy {accuracy:.2f}")

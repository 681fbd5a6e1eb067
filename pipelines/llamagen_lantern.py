"""LANTERN: nearby tokens may stand for each other, so that more draft tokens are accepted.

python pipelines/llamagen_lantern.py
"""

from pathlib import Path

from varaccel import AutoPipeline, Lantern, Speculative

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompts = ["a red sphere left of a blue cube at sunset", "a large green cone"]
exact = pipe(prompts, seed=0, accelerator=Speculative("eagle", tree=4))
print(exact.stats)

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for accelerator in (Lantern(k=10, delta=0.2), Lantern(k=10, multiplier=5.0)):
    relaxed = pipe(prompts, seed=0, accelerator=accelerator)
    print(relaxed.stats)
    bound = "delta" if accelerator.multiplier is None else "multiplier"
    relaxed.images[0].save(folder / f"llamagen-lantern-{bound}.png")

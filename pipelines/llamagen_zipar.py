"""The same images with ZipAR, and how many passes that saves.

python pipelines/llamagen_zipar.py
"""

from pathlib import Path

from varaccel import AutoPipeline, ZipAR

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompts = ["a red sphere left of a blue cube at sunset", "a large green cone"]
plain = pipe(prompts, seed=0)
fast = pipe(prompts, seed=0, accelerator=ZipAR(window=8))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, image in enumerate(fast.images):
    image.save(folder / f"llamagen-zipar-{index}.png")
print(plain.stats)
print(fast.stats)
print(f"{plain.stats.passes / fast.stats.passes:.1f} times fewer passes")

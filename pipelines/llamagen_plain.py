"""Images from prompts with the shipped model, one token per pass.

python pipelines/llamagen_plain.py
"""

from pathlib import Path

from varaccel import AutoPipeline

pipe = AutoPipeline.from_pretrained("mini-llamagen")
out = pipe(["a red sphere left of a blue cube at sunset", "a large green cone"], seed=0)

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, image in enumerate(out.images):
    image.save(folder / f"llamagen-plain-{index}.png")
print(out.stats)

"""Images from prompts with the shipped next-scale model, one scale per pass.

python pipelines/var_plain.py
"""

from pathlib import Path

from varaccel import AutoPipeline

pipe = AutoPipeline.from_pretrained("mini-var")
out = pipe(["a red sphere left of a blue cube at sunset", "a large green cone"], seed=0)

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, image in enumerate(out.images):
    image.save(folder / f"var-plain-{index}.png")
print(out.stats)

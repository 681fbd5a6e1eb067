"""Images from prompts with the shipped masked model, tokens in random order and groups that grow.

python pipelines/mar_plain.py
"""

from pathlib import Path

from varaccel import AutoPipeline

pipe = AutoPipeline.from_pretrained("mini-mar")
prompts = ["a red cone right of a small orange cylinder on a wood floor", "a tiny white ball"]
out = pipe(prompts, seed=0, num_iterations=32, head_steps=25)

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, image in enumerate(out.images):
    image.save(folder / f"mar-plain-{index}.png")
out.acceptance_maps(overlay=True)[0].save(folder / "mar-plain-passes.png")
print(out.stats)

"""Fewer iterations and a quick solver in the diffusion head, and features kept between passes, beside plain decoding.

python pipelines/mar_fast.py
"""

from pathlib import Path

from varaccel import AutoPipeline, FeatureCache, FewerSteps
from varaccel.pipelines.pixels import grid

pipe = AutoPipeline.from_pretrained("mini-mar")
prompt = "a big shiny cyan cone to the left of a small orange cone on a blue floor"
plain = pipe(prompt, seed=0, num_iterations=64, head_steps=50)
quick = {"head_steps": 20, "head_sampler": "dpm++"}
fewer = pipe(prompt, seed=0, accelerator=FewerSteps(iterations=32, **quick))
cached = pipe(prompt, seed=0, accelerator=FeatureCache(refresh=4, iterations=64, **quick))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
plain.images[0].save(folder / "mar-fast-plain.png")
fewer.images[0].save(folder / "mar-fast.png")
grid([out.images[0] for out in (plain, fewer, cached)], columns=3).save(folder / "mar-fast-sheet.png")
for out in (plain, fewer, cached):
    print(out.stats)

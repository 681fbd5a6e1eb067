"""Continuous speculative decoding beside plain decoding: a smaller model drafts, the model keeps or replaces.

python pipelines/mar_cspd.py
"""

from pathlib import Path

from varaccel import AutoPipeline, CSpD

pipe = AutoPipeline.from_pretrained("mini-mar")  # comes with mini-mar-small as its drafter
prompt = "a red cone right of a small orange cylinder on a wood floor"
call = {"seed": 0, "num_iterations": 32, "head_steps": 25}
plain = pipe(prompt, **call)

drafted = {mode: pipe(prompt, accelerator=CSpD(mode), **call) for mode in ("reference", "paper", "exact")}

folder = Path("outputs")
folder.mkdir(exist_ok=True)
plain.images[0].save(folder / "mar-cspd-plain.png")
drafted["exact"].images[0].save(folder / "mar-cspd.png")
print(plain.stats)
for out in drafted.values():
    print(out.stats)  # passes of either network, and how many draft tokens were kept

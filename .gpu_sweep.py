import re, sys
from functools import partial
from pathlib import Path
import torch
sys.path.insert(0, ".")
from benchmarks import bench_combine as b
import cfg_parallel.triton_kernels.guidance as k
torch.cuda.set_device(0)
total = {}
for n in (1024, 2048, 4096):
    k.MAX_PROGRAMS = n
    line = []
    for label in ("rescale", "apg", "zero_star"):
        for dtype in (torch.bfloat16, torch.float32):
            rule = b.RULES[label]
            moved = b.moved_bytes(rule, 64 << 20, False)
            sets = b.rotation(partial(b.draw, rule, 64 << 20, dtype, torch.device("cuda", 0)), moved)
            r = b.timed([partial(b.call, label, t, False, "triton", "fused") for t in sets], moved, 5)
            line.append(r["us"])
    total[n] = sum(line)
    print("programs", n, line, flush=True)
best = min(total, key=total.get)
print("best", best)
path = Path(k.__file__)
path.write_text(re.sub(r"MAX_PROGRAMS = \d+", f"MAX_PROGRAMS = {best}", path.read_text()))

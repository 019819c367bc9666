"""Edit a picture on two devices: `cfg-parallel edit` as a script, with the same flags and the same exit status.

    python image_edit.py --model Qwen/Qwen-Image-Edit --image cat.png --prompt "turn this cat into a dog" \
        --negative-prompt "low quality, blurry" --cfg-scale 4.0 --cfg-parallel-size 2 --output dog.png

In a program of your own, the one line that matters is `cfg_parallel.enable_cfg_parallel(pipe)`.
"""

import sys

from cfg_parallel.cli import main

if __name__ == "__main__":
    sys.exit(main(["edit", *sys.argv[1:]]))

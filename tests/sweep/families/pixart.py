"""PixArt alpha and sigma."""

from __future__ import annotations

import diffusers

from sweep.build import Case


def transformer() -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
        num_embeds_ada_norm=1000,
    )


def scheduler() -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2)


PARTS = {"transformer": transformer, "scheduler": scheduler}
CALL = {"max_sequence_length": 40, "use_resolution_binning": False, "clean_caption": False}

CASES = [
    Case("PixArtAlphaPipeline", PARTS, CALL),
    Case("PixArtSigmaPipeline", PARTS, CALL),
    Case("PixArtSigmaPAGPipeline", PARTS, CALL),
]

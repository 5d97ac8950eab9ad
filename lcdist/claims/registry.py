"""The claims: what five papers say of their methods, and how it is asked of our small models.

Figures of the papers are quoted for comparison, and for nothing else: their models have 350 million
parameters and more, ours a few million.
"""

from lcdist.claims import rules
from lcdist.claims.claim import Claim
from lcdist.claims.jobs import EXTENDED, TOP_K

COCA, SCCA, TENSORIZED = "2309.08646", "2312.07305", "2410.20926"
LANDMARK, LSSAR = "2305.16300", "2501.13428"
SECOND_HAND = "second hand, not checked against the paper"
# Multiples of the training length.
FAR = 16

_COCA_PPL = (
    "350M at 512 tokens, PG-19, at 512 and 8,192: RoPE 19.66, 3028; CoCA 20.11, 157.38; with "
    "dynamic NTK: RoPE 19.66, 138.13; CoCA 20.11, 55.75"
)
_LSSAR_LOSS = (
    "124M at 1K, validation loss at 1K, 2K, 4K, 8K: softmax 3.19, 4.17, 5.45, 6.28; LSSA 3.19, "
    "4.13, 5.30, 5.94; p = 3 3.18, 4.24, 5.41, 6.30; p = 15 3.19, 3.19, 3.23, 3.32"
)
_SCCA_PPL = "LLaMA2-7B, PG-19 at 8K: S2 9.41, fixed 9.17, flow 9.47, LongMixed 8.73"

CLAIMS = (
    Claim(
        "coca-steady",
        COCA,
        "CoCA (slack) does not diverge beyond the training length where RoPE does.",
        _COCA_PPL,
        "table 1, version 3",
        ("coca-slack", "full"),
        f"at {FAR}x perplexity grows by at most {rules.DIVERGES:g} times, and by more with RoPE",
        rules.steady_where_other_diverges("coca-slack", "full", FAR, rules.DIVERGES),
    ),
    Claim(
        "coca-strict-steady",
        COCA,
        "Strict CoCA extrapolates as slack CoCA does.",
        "350M, dynamic NTK 4, at 8,192 tokens: slack 55.75, strict 58.91",
        "table 3, version 3",
        ("coca-strict", "full"),
        f"at {FAR}x perplexity grows by at most {rules.DIVERGES:g} times, and by more with RoPE",
        rules.steady_where_other_diverges("coca-strict", "full", FAR, rules.DIVERGES),
    ),
    Claim(
        "coca-ntk",
        COCA,
        "With dynamic NTK, CoCA extrapolates better than RoPE.",
        _COCA_PPL,
        "table 1, version 3",
        ("coca-slack-ntk", "full-ntk"),
        f"perplexity grows less to {FAR}x; the interval of the ratio is below 1",
        rules.grows_less("coca-slack-ntk", "full-ntk", FAR),
    ),
    Claim(
        "coca-passkey",
        COCA,
        "With dynamic NTK, CoCA finds passkeys beyond the training length better than RoPE.",
        "350M at 512: at 4,096 RoPE .70, CoCA .89; at 8,192 .41, .50",
        "table 2, version 3",
        ("coca-slack-ntk", "full-ntk"),
        "more at some length of 2x to 8x, fewer at none; intervals do not overlap",
        rules.finds_more("coca-slack-ntk", "full-ntk", (2, 4, 8)),
    ),
    Claim(
        "lssar-steady",
        LSSAR,
        "The loss of LSSAR with p = 15 is nearly constant to 16 times the training length, where "
        "that of softmax rises.",
        _LSSAR_LOSS,
        SECOND_HAND,
        ("lssar-p15", "full"),
        f"at {FAR}x perplexity grows by at most {rules.STEADY:g} times, with softmax by more than "
        f"{rules.DIVERGES:g}",
        rules.steady_where_other_diverges("lssar-p15", "full", FAR, rules.STEADY),
    ),
    Claim(
        "lssar-as-good",
        LSSAR,
        "At the training length LSSAR with p = 15 is as good as softmax.",
        _LSSAR_LOSS,
        SECOND_HAND,
        ("lssar-p15", "full"),
        "after the same tokens its perplexity is at most 1.05 times that of softmax",
        rules.as_good("lssar-p15", "full", 1, 1.05),
    ),
    Claim(
        "lssar-power",
        LSSAR,
        "The power is what matters: p = 15 extrapolates better than p = 3.",
        _LSSAR_LOSS,
        SECOND_HAND,
        ("lssar-p15", "lssar-p3"),
        f"perplexity grows less to {FAR}x; the interval of the ratio is below 1",
        rules.grows_less("lssar-p15", "lssar-p3", FAR),
    ),
    Claim(
        "lssar-length-scaled",
        LSSAR,
        "LSSAR with p = 15 extrapolates better than length-scaled softmax: the scale with the "
        "length is not what matters.",
        _LSSAR_LOSS,
        SECOND_HAND,
        ("lssar-p15", "length-scaled"),
        f"perplexity grows less to {FAR}x; the interval of the ratio is below 1",
        rules.grows_less("lssar-p15", "length-scaled", FAR),
    ),
    Claim(
        "lssar-later",
        LSSAR,
        "Re-weighting can be added to a trained model: LSSA read with p = 15 extrapolates better "
        "than LSSA.",
        "ablations give no such figure for LSSA; softmax with p = 15 added: 7.02 at 8K",
        SECOND_HAND,
        ("lssa-read-p15", "lssa"),
        f"perplexity is lower at {FAR}x; the interval of the ratio is below 1",
        rules.lower("lssa-read-p15", "lssa", FAR, converge=["lssa"]),
    ),
    Claim(
        "lssar-p3-later",
        "",
        "A model trained with p = 3 and read with p = 15 extrapolates better than read as trained.",
        "none",
        "ours",
        ("lssar-p3-read-p15", "lssar-p3"),
        f"perplexity is lower at {FAR}x; the interval of the ratio is below 1",
        rules.lower("lssar-p3-read-p15", "lssar-p3", FAR, converge=["lssar-p3"]),
    ),
    Claim(
        "lssar-growing",
        "",
        "A power that grows in training (1, 3, 7, 15) ends better than p = 15 in the same stages.",
        "none",
        "ours",
        ("lssar-growing", "lssar-staged"),
        "perplexity at the training length is lower; the interval of the ratio is below 1",
        rules.lower("lssar-growing", "lssar-staged", 1, converge=["lssar-growing"]),
    ),
    *(
        Claim(
            f"scca-{pattern}{suffix}",
            SCCA,
            f"Extended by SCCA's {pattern}, a model is better than by S2-Attn, at equal {what}.",
            _SCCA_PPL,
            SECOND_HAND,
            (f"extend-{pattern}{suffix}", "extend-s2", "full"),
            f"perplexity at {EXTENDED}x is lower; the interval of the ratio is below 1",
            rules.lower(f"extend-{pattern}{suffix}", "extend-s2", EXTENDED, start="full"),
        )
        for suffix, what in (("", "tokens"), ("-flops", "operations"))
        for pattern in ("fixed", "longmixed")
    ),
    *(
        Claim(
            f"scca-flow{suffix}",
            SCCA,
            f"Extended by SCCA's flow, a model is about as good as by S2-Attn, at equal {what}.",
            _SCCA_PPL,
            SECOND_HAND,
            (f"extend-flow{suffix}", "extend-s2", "full"),
            f"perplexity at {EXTENDED}x is at most 1.01 times that of S2-Attn",
            rules.as_good(f"extend-flow{suffix}", "extend-s2", EXTENDED, 1.01, start="full"),
        )
        for suffix, what in (("", "tokens"), ("-flops", "operations"))
    ),
    *(
        Claim(
            f"scca-full{suffix}",
            "",
            f"A sparse pattern loses nothing: longmixed is as good as full attention, at equal "
            f"{what}.",
            "none",
            "ours",
            (f"extend-longmixed{suffix}", f"extend-full{suffix}", "full"),
            f"perplexity at {EXTENDED}x is at most 1.02 times that of full attention",
            rules.as_good(
                f"extend-longmixed{suffix}", f"extend-full{suffix}", EXTENDED, 1.02, start="full"
            ),
        )
        for suffix, what in (("", "tokens"), ("-flops", "operations"))
    ),
    *(
        Claim(
            f"{name}-steady",
            TENSORIZED,
            f"Trained at one length, tensorized attention ({how}) is steady at four times it.",
            "Llama-8B trained at 32K is read to 128K; no table to be had",
            "abstract",
            (name,),
            f"at 4x perplexity grows by at most {rules.STEADY:g} times",
            rules.steady(name, 4),
        )
        for name, how in (
            ("tensorized-mode", "positions of modes"),
            ("tensorized-global", "global positions"),
            ("tensorized-layers", "positions of modes, last layer full"),
        )
    ),
    *(
        Claim(
            f"landmark-k{top_k}",
            LANDMARK,
            f"Reading {top_k} past block{'s' * (top_k > 1)} a token is nearly as good as reading "
            "all.",
            "PG-19 at 4,096: Transformer-XL 14.55, landmark with 4 blocks 14.72",
            SECOND_HAND,
            (f"landmark-k{top_k}", "landmark"),
            "at 1x perplexity is at most 1.02 times that of all blocks",
            rules.as_good(f"landmark-k{top_k}", "landmark", 1, 1.02),
        )
        for top_k in TOP_K
    ),
    Claim(
        "landmark-passkey",
        LANDMARK,
        "Landmark attention finds passkeys far beyond the training length, with blocks from host "
        "memory.",
        "LLaMA-7B at 32K: about 98 %",
        SECOND_HAND,
        ("landmark-k4",),
        f"at least 80 % are found at {FAR}x",
        rules.finds("landmark-k4", FAR, 0.8),
    ),
)

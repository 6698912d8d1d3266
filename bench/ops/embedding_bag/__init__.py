"""The benchmarks of embedding bags."""

from bench.core.families import Family, register
from bench.core.probe import ReadLimit
from bench.ops.embedding_bag import peers
from bench.ops.embedding_bag.cases import CASES, EmbeddingBagCase, EmbeddingBagWorkload

register(
    Family(
        name=EmbeddingBagCase.family,
        title="Embedding bag",
        unit="GB/s",
        size_label="Tables",
        note="""\
GB/s count the bytes of the rows read. The last-level cache holds {cache}: a table of less than twice that size is
partly served from the cache. The limit is what a probe reads from the same rows, on 2 MiB pages, with nothing but
prefetches and loads. Small or skewed cases stay in caches and the call itself takes time, so the share of the limit
says little of them.""",
        cases=CASES,
        case_type=EmbeddingBagCase,
        limit_type=ReadLimit,
        workload=EmbeddingBagWorkload,
        peers=peers,
        plot=f"{__name__}.plot",
        packages=("fbgemm_gpu-cpu", "torchrec"),
        huge_pages=True,
    )
)

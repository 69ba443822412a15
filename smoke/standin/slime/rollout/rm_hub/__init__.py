from argparse import Namespace
from typing import Any

from slime.utils.misc import load_function
from slime.utils.types import Sample


async def async_rm(args: Namespace, sample: Sample, **kwargs: Any) -> Any:
    return await load_function(sample.custom_rm_path or args.custom_rm_path)(args, sample, **kwargs)

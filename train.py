"""Train a mixture-of-experts language model: `python train.py --help` lists every option."""

import os
import sys
from pathlib import Path

# Hydra prints and exits by itself unless told to raise; our errors are one line each and end with code 2.
os.environ["HYDRA_FULL_ERROR"] = "1"

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from moe_parallel import options
    from moe_parallel.launch import read_environment
    from moe_parallel.run import run
except ModuleNotFoundError as error:
    sys.exit(f"{error}; run `make install` first, then use .venv/bin/python")

CONFIGS = Path(__file__).parent / "configs"


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    name = str(hydra_config.runtime.choices["model"])
    if hydra_config.mode is RunMode.MULTIRUN and hydra_config.job.override_dirname:
        name += "/" + hydra_config.job.override_dirname
    code = run(options.to_config(composed), default_name=name)
    if code != 0:
        sys.exit(code)


def start() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(options.help_text([CONFIGS, *options.config_folders(sys.argv)]))
        return
    options.register()
    try:
        main()
    except (options.ConfigError, HydraException, OmegaConfBaseException) as error:
        if read_environment()[0] == 0:  # one voice, whatever the number of ranks
            print(f"error: {options.explain(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    start()

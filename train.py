"""Train a mixture-of-experts language model: `python train.py --help` lists every option."""

import os
import sys
from pathlib import Path

# Hydra prints and exits by itself unless told to raise; our errors are one line each and end with code 2.
os.environ["HYDRA_FULL_ERROR"] = "1"

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from moe_parallel import launch, options
    from moe_parallel.run import BAD_INPUT, DONE, FAULT, REQUEUE, conclude, run
except ModuleNotFoundError as error:
    sys.exit(f"{error}; run `make install` first, then use .venv/bin/python")

CONFIGS = Path(__file__).parent / "configs"


def main() -> int:
    # Hydra's parser wants flags first; users put them anywhere.
    sys.argv[1:] = arguments = sorted(sys.argv[1:], key=lambda text: "=" in text and not text.startswith("-"))
    if "--help" in arguments or "-h" in arguments:
        print(options.help_text([CONFIGS, *options.config_folders(arguments)]))
        return DONE
    options.register()
    codes: dict[str, int] = {}

    @hydra.main(version_base=None, config_path="configs", config_name="train")
    def job(composed: DictConfig) -> None:
        job_config = HydraConfig.get()
        swept = options.swept_name(job_config.overrides.task, arguments)
        try:
            config = options.to_config(composed)
            name = config.run.name or str(job_config.runtime.choices.get("model") or "run")
            codes[swept] = run(config, f"{name}/{swept}" if swept else name, job=len(codes))
        except options.ConfigError as error:
            launch.refuse(error)
            codes[swept] = BAD_INPUT
        except Exception:
            # Hydra would go on with the sweep and show this at its end, below many frames of its own.
            sys.excepthook(*sys.exc_info())
            sys.exit(FAULT)
        if codes[swept] == REQUEUE:
            sys.exit(REQUEUE)

    try:
        job()
    except options.COMPOSITION_ERRORS as error:
        launch.refuse(options.ConfigError(options.explain(error, arguments)))
        return BAD_INPUT
    return conclude(codes)


if __name__ == "__main__":
    sys.exit(main())

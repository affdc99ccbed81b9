"""``serve``: the driver."""

from __future__ import annotations

import logging
import sys

import click

from csi.cli.options import Invocation, global_options, pass_invocation, setting_options
from csi.cli.running import Interrupted, run
from fetcher import logs

logger = logging.getLogger(__name__)


@click.command(short_help="Serve CSI and the agent.")
@setting_options(None)
@global_options
@pass_invocation
def serve(invocation: Invocation) -> None:
    """Serve the Container Storage Interface, and the agent that other commands talk to.

    Ends on SIGTERM or SIGINT. Mounts stay as they are, and downloads go on where they stopped when
    it starts again. Each option is also an environment variable, MODEL_CSI_ and its name, and a key
    of the configuration file.

    \b
    Examples:
      model-csi serve --endpoint unix:///csi/csi.sock --node-id "$NODE_NAME"
      model-csi serve --mode all --config /etc/model-csi.yaml --log-format json
    """
    config = invocation.config(serving=True)
    with logs.configured(config.log_level, config.log_format, sys.stderr):
        try:
            run(lambda: invocation.program.serve(config))
        except Interrupted as signal:
            # being told to end is how a driver ends
            logger.info("ended by %s", signal.number.name)

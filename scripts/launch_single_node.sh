#!/usr/bin/env bash
# The old name, for one release.
echo "scripts/launch_single_node.sh is now scripts/launch/single_node.sh" >&2
exec bash "$(dirname "$0")/launch/single_node.sh" "$@"

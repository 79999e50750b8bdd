#!/usr/bin/env bash
# The old name, for one release.
echo "scripts/launch_multi_node.sh is now scripts/launch/multi_node.sh" >&2
exec bash "$(dirname "$0")/launch/multi_node.sh" "$@"

#!/bin/sh
# A workload that means no harm, in the place of the shell: downloads from its consumer when it is asked to.
export PATH=/bin:/usr/sbin
stty -echo
echo "workload: ready"
while read -r what; do
    # Through the tunnel, which may be about to come up again.
    until [ "$(timeout 120 nc -w 5 10.66.0.1 80 </dev/null | wc -c)" = 4194304 ]; do sleep 1; done
    echo "workload: done $what"
done

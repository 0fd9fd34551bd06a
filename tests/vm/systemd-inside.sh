#!/bin/bash
# What tests/vm/systemd.sh runs inside its machine.
# The single quotes are for the shell that checks run.
# shellcheck disable=SC2016
set -u
check() {
    local what=$1
    shift
    if output=$("$@" 2>&1); then
        echo "ok   $what"
    else
        echo "FAIL $what: $(echo "$output" | tail -n 3 | tr '\n' ' ')"
    fi
}
tell() { echo "told $*"; }

uptime=$(cut -d ' ' -f 1 /proc/uptime)
tell "systemd $(systemctl --version | awk 'NR == 1 { print $2 }') on $(uname -r), up after $uptime s"
check "the units are sound" systemd-analyze verify /etc/systemd/system/omertad.service /etc/systemd/system/omerta-guests.service
tell "$(systemd-analyze security --no-pager omertad.service | tail -n 1)"

# A guest of a few instructions: a multiboot kernel that writes A to its console without end.
image=/root/bare
mkdir -p $image
printf '\x02\xb0\xad\x1b\x00\x00\x01\x00\xfe\x4f\x51\xe4\x00\x00\x10\x00\x00\x00\x10\x00\x2a\x00\x10\x00\x2a\x00\x10\x00\x20\x00\x10\x00\xba\xf8\x03\x00\x00\xb0\x41\xee\xeb\xfd' > $image/vmlinuz
echo none > $image/initrd.img
check "a key is made" omerta image keygen /root/image.key
install -D -m 644 /root/image.key.pub /etc/omerta/trusted-keys/image.key.pub
check "the image is imported" omerta image import $image --name bare --sign-with /root/image.key
ip link set lo up
modprobe tun

check "the unit starts" systemctl start omertad
for _ in $(seq 120); do
    omerta vm list > /dev/null 2>&1 && break
    sleep 1
done
check "omertad answers" omerta vm list
run() {
    omerta vm run --name "$1" --image bare --memory 64 \
        --consumer BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=@192.0.2.10:51820 -o json
}
# An emulated machine on a busy host is slower than omertad waits for a file.
for _ in 1 2 3; do
    run warm-up > /dev/null 2>&1 && break
done
omerta vm kill warm-up > /dev/null 2>&1
check "a guest runs" run alpha
check "its guard is seen from outside the unit" sh -c 'omerta guard show omalpha -o json | jq -e ".owner == \"omertad\""'
check "its pins are in the host's bpffs" sh -c 'ls -d /sys/fs/bpf/omerta/*/omalpha'
check "IPv6 is off on its tap" sh -c '[ ! -e /proc/sys/net/ipv6 ] || grep -q 1 /proc/sys/net/ipv6/conf/omalpha/disable_ipv6'
qemu=$(omerta vm show alpha -o json | jq -r .pid)
status=/proc/$qemu/status
for namespace in net mnt ipc uts; do
    check "QEMU has its own $namespace namespace" sh -c "its=\$(readlink /proc/$qemu/ns/$namespace) && [ \$its != \$(readlink /proc/1/ns/$namespace) ]"
done
check "QEMU has a user of its own" grep -qP '^Uid:(\t19000\d{5}){4}$' "$status"
check "QEMU has no capability" sh -c "[ \$(grep -cP '^Cap(Inh|Prm|Eff|Bnd|Amb):\t0+$' $status) = 5 ]"
check "QEMU gets no privileges back, behind seccomp" sh -c "grep -qP '^NoNewPrivs:\t1' $status && grep -qP '^Seccomp:\t2' $status"
cgroup=/sys/fs/cgroup$(cut -d : -f 3 "/proc/$qemu/cgroup")
unit=/sys/fs/cgroup$(systemctl show -p ControlGroup --value omerta-guests)
tell "QEMU's cgroup: $cgroup, at most $(cat "$cgroup/memory.max") bytes, $(cat "$cgroup/pids.max") tasks, cpu $(cat "$cgroup/cpu.max")"
check "QEMU is limited in the cgroup of the unit for guests" sh -c "[ $(dirname "$cgroup") = $unit ] && grep -qv max $cgroup/memory.max $cgroup/pids.max && grep -q ^150000 $cgroup/cpu.max"
own=/sys/fs/cgroup$(systemctl show -p ControlGroup --value omertad)
check "omertad is not among guests" sh -c "[ \$(cat $own/cgroup.procs) = \$(systemctl show -p MainPID --value omertad) ]"
check "its log is read" sh -c 'sleep 2; omerta vm logs alpha | grep -q AAAA'

systemctl kill --kill-whom=main -s KILL omertad
sleep 2
check "the unit starts after omertad was killed" systemctl start omertad
for _ in $(seq 120); do
    omerta vm show alpha -o json 2> /dev/null | jq -e '.state == "running"' > /dev/null && break
    sleep 1
done
check "its guest was taken over" sh -c "omerta vm show alpha -o json | jq -e '.state == \"running\" and .pid == $qemu'"
check "it is where it was" grep -q "^$qemu$" "$cgroup/cgroup.procs"

ip tuntap add dev tap9 mode tap
check "another tap is guarded beside it" omerta guard attach tap9 --mac 52:54:00:12:34:56 --ip 10.0.0.5 \
    --gateway 10.0.0.1 --allow udp:192.0.2.10:51820
check "omertad's guard is not changed by others" sh -c '! omerta guard allow omalpha udp:198.51.100.9:53'

check "a guest is ended" omerta vm kill alpha
check "its cgroup and its user are given back" sh -c "[ ! -e $cgroup ] && [ ! -e /var/lib/omerta/guest-uids/19* ]"
check "a second one runs" run beta
ip link delete omalpha 2> /dev/null
ip link delete ombeta
for _ in $(seq 30); do
    [ "$(omerta vm show beta -o json | jq -r .state)" = ended ] && break
    sleep 1
done
check "a guest whose tap is removed is ended" sh -c 'omerta vm show beta -o json | jq -e ".ended.cause == \"guard_failed\""'
tell "$(omerta vm show beta -o json | jq -r .ended.message)"

chown 1000 $image/vmlinuz
chmod 600 $image/vmlinuz
tell "$(run gamma 2>&1 | tail -n 1)"
chown 0 $image/vmlinuz
check "a third one runs" run delta

check "the unit stops" systemctl stop omertad
check "it ended well" sh -c '[ "$(systemctl show -p Result --value omertad)" = success ]'
check "no QEMU is left" sh -c '! pgrep -f "[q]emu-system-x86_64"'
check "no tap is left" sh -c '! ip -o link | grep -q ": om"'
check "no pin of its is left" sh -c '! ls -d /sys/fs/bpf/omerta/*/om*'
check "nothing is left in its run directory" sh -c '[ -z "$(ls -A /run/omerta)" ]'
check "the other tap is guarded still" sh -c 'omerta guard list | grep -q tap9'
journalctl -u omertad --no-pager -o cat | grep -E 'WARN|ERROR' | sort | uniq -c | while read -r line; do tell "$line"; done
echo "ok   all was checked"

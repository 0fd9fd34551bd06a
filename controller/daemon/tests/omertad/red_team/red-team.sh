#!/bin/sh
# The red team in a guest, in the place of its shell: root, who does what the other end of the console asks for
# by name. What an attack needs is in the image; each has an address of its own, which tells it from the others.
export PATH=/bin:/usr/sbin
stty -echo
. /sys/firmware/qemu_fw_cfg/by_name/opt/omerta/config/raw

once() { ping -c 1 -W 1 -w 2 "$@"; }
connect() { timeout 2 nc -w 1 "$@" </dev/null; }

# Everything of the guest's own that could be in the way of a packet.
disarm() {
    nft flush ruleset
    ip route replace default via "$gateway" dev eth0 src "$address"
}

do_attack() {
    case $1 in
    disarm) disarm ;;
    past_its_firewall) once -I eth0 203.0.113.9 ;;
    console_forged) echo 'ROGUE-ATTEMPT: forged by root' >/dev/console ;;
    rules_flushed) nft flush ruleset ;;
    tunnel_removed) ip link del wg0 ;;
    direct_internet)
        disarm
        connect 198.51.100.80 80
        ;;
    tunnel_fails_open)
        nft flush ruleset
        ip link del wg0
        ip route replace default via "$gateway" dev eth0 src "$address"
        once 198.51.100.81
        ;;
    lan_scan)
        disarm
        for host in 1 2 3 4 5 6; do once 192.168.1.$host; done
        ;;
    dns) timeout 2 tftp -g -l /dev/null -r name 198.51.100.53 53 ;;
    metadata) connect 169.254.169.254 80 ;;
    other_guest) once "${gateway%.*}.77" ;;
    hosts_services) connect "$gateway" 22 ;;
    consumers_other_port) connect "$consumer_address" 80 ;;
    icmp_exfiltration) once -s 1200 198.51.100.82 ;;
    forged_address)
        ip addr add 198.51.100.200/32 dev eth0
        once -I 198.51.100.200 198.51.100.83
        ip addr del 198.51.100.200/32 dev eth0
        ;;
    forged_mac)
        ip link set eth0 address 52:54:00:de:ad:01
        once 198.51.100.84
        ;;
    arp_scan) arping -c 1 -w 1 -I eth0 192.168.1.77 ;;
    arp_poison)
        echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind
        arping -U -c 1 -w 1 -I eth0 "$gateway"
        ;;
    dhcp) udhcpc -n -q -t 1 -T 1 -i eth0 -s /bin/true ;;
    ipv6)
        echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
        ip -6 addr add 2001:db8::2/64 dev eth0
        # Its address is probed for first.
        sleep 2
        ping6 -c 1 -W 1 -w 2 2001:db8::1
        echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
        ;;
    fragments) once -s 3000 "$consumer_address" ;;
    clock_moved)
        date -s @4102444800
        once 198.51.100.85
        date -s @0
        ;;
    console_flooded)
        yes 'ROGUE-ATTEMPT: flood' | head -c 100000 >/dev/console &
        once 198.51.100.86
        wait
        ;;
    ring_flooded)
        for _ in 1 2 3 4 5 6 7 8; do ping -c 500 -i 0.001 -W 1 -w 3 198.51.100.87 & done
        wait
        ;;
    agent_stopped) kill -STOP "$(pidof omerta-agent)" ;;
    agent_goes_on) kill -CONT "$(pidof omerta-agent)" ;;
    agent_killed) kill -9 "$(pidof omerta-agent)" ;;
    agent_replaced) omerta-agent ;;
    agents_port_garbled)
        kill -9 "$(pidof omerta-agent)"
        for port in /sys/class/virtio-ports/*; do
            [ "$(cat "$port/name")" != org.omerta.agent ] || yes garbled | head -c 5000 >"/dev/${port##*/}"
        done
        ;;
    *) return 1 ;;
    esac
}

echo "workload: ready"
while read -r attack; do
    do_attack "$attack"
    echo "workload: done $attack"
done

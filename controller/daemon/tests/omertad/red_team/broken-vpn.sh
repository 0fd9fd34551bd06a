# Read by /init in the place of what sets up the network: a VPN that is configured wrongly, and a guest that takes no
# notice: no firewall, no tunnel, and out it goes.
load_modules() {
    [ -z "$1" ] || grep -qx "$1" /lib/modules/order || return 0
    while read -r module <&4; do
        [ -d "/sys/module/$module" ] || insmod "/lib/modules/$module.ko"
        [ "$module" != "$1" ] || break
    done 4</lib/modules/order
}

load_firewall() { :; }

configure_network() {
    until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done
    ip link set eth0 up
    ip addr add "$address/32" dev eth0
    ip route add "$gateway" dev eth0 scope link src "$address"
    ip link add wg0 type wireguard
    wg set wg0 peer no-key endpoint "$consumer_address:$consumer_port" allowed-ips 0.0.0.0/0
    ip link set wg0 up && ip route add default dev wg0 metric 10
    # The tunnel's route fails with the tunnel, the other one does not.
    ip link del wg0
    ip route add default via "$gateway" dev eth0 src "$address"
    ping -c 1 -w 1 198.51.100.79
}

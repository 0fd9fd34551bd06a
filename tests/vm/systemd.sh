#!/bin/bash
# Boots a Debian with systemd under TCG and runs omertad there as deploy/systemd/omertad.service has it: the unit's
# restrictions must leave it able to do its work. As root, with apt's archive in reach.
#
# tests/vm/systemd.sh [OMERTAD OMERTA]        default: target/debug/omertad target/debug/omerta
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
omertad=${1:-$here/target/debug/omertad}
omerta=${2:-$here/target/debug/omerta}
work=$here/target/vm/systemd
deadline=${OMERTA_VM_SECONDS:-600}
mkdir -p "$work"

for program in "$omertad" "$omerta"; do
    [ -x "$program" ] || { echo "systemd.sh: no $program: build it with cargo build" >&2; exit 1; }
done

for program in mmdebstrap mke2fs depmod modprobe busybox cpio xz qemu-system-x86_64; do
    command -v "$program" > /dev/null || {
        echo "systemd.sh: no $program: apt-get install mmdebstrap e2fsprogs kmod busybox-static cpio xz-utils qemu-system-x86" >&2
        exit 1
    }
done

if [ ! -d "$work/base" ]; then
    echo "a Debian with systemd and QEMU (once)"
    rm -rf "$work/base.part"
    mmdebstrap --quiet --variant=minbase \
        --include=systemd,systemd-sysv,udev,iproute2,qemu-system-x86,kmod,procps,jq \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$work/base.part"
    mv "$work/base.part" "$work/base"
fi

if [ ! -d "$work/kernel" ]; then
    echo "a kernel with TCX (once)"
    package=$(apt-cache pkgnames linux-image-6.12. | grep -E -- '-cloud-amd64$' | sort -V | tail -n 1)
    [ -n "$package" ] || { echo "systemd.sh: apt knows no linux-image-6.12.*-cloud-amd64: add bookworm-backports" >&2; exit 1; }
    rm -rf "$work/kernel.part"
    mkdir "$work/kernel.part"
    (cd "$work/kernel.part" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./*.deb . && rm ./*.deb)
    mv "$work/kernel.part" "$work/kernel"
fi
release=$(basename "$(echo "$work"/kernel/lib/modules/*)")
depmod -b "$work/kernel" "$release"

echo "its disk"
root=$work/root
rm -rf "$root"
cp -a "$work/base" "$root"
cp -a "$work/kernel/lib/modules" "$root/usr/lib/"
install -m 755 "$omertad" "$omerta" "$root/usr/local/bin/"
for unit in omertad omerta-guests; do
    install -D -m 644 "$here/deploy/systemd/$unit.service" "$root/etc/systemd/system/$unit.service"
done
install -D -m 644 "$here/deploy/omertad.toml" "$root/etc/omerta/omertad.toml"
install -D -m 755 "$here/tests/vm/systemd-inside.sh" "$root/usr/local/bin/inside"
cat > "$root/etc/systemd/system/inside.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/bin/inside
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
UNIT
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf ../inside.service "$root/etc/systemd/system/multi-user.target.wants/inside.service"
ln -sf /dev/null "$root/etc/systemd/system/serial-getty@ttyS0.service"
rm -f "$work/disk"
mke2fs -q -t ext4 -d "$root" "$work/disk" 1500M
rm -rf "$root"

# The least that finds the disk.
early=$work/early
rm -rf "$early"
mkdir -p "$early"/{bin,dev,proc,sys,root,modules}
cp "$(command -v busybox)" "$early/bin/busybox"
modules=()
for module in virtio_pci virtio_blk ext4; do
    while read -r kind path _; do
        [ "$kind" = insmod ] || continue
        name=$(basename "$path")
        cp -n "$path" "$early/modules/"
        modules+=("$name")
    done < <(modprobe -d "$work/kernel" -S "$release" --show-depends "$module")
done
{
    echo '#!/bin/busybox sh'
    echo '/bin/busybox mount -t devtmpfs dev /dev'
    for module in "${modules[@]}"; do
        case $module in
            *.xz) echo "/bin/busybox xzcat /modules/$module > /m.ko; /bin/busybox insmod /m.ko" ;;
            *) echo "/bin/busybox insmod /modules/$module" ;;
        esac
    done
    echo '/bin/busybox mount -t ext4 /dev/vda /root'
    echo 'exec /bin/busybox switch_root /root /sbin/init'
} > "$early/init"
chmod 755 "$early/init"
(cd "$early" && find . | cpio --quiet -o -H newc | gzip -1) > "$work/initrd"

echo "it boots, and checks itself"
log=$work/log
: > "$log"
timeout "$deadline" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1536 -nodefaults \
    -display none -no-reboot -serial "file:$log" -nic none \
    -kernel "$work"/kernel/boot/vmlinuz-* -initrd "$work/initrd" \
    -append 'console=ttyS0 quiet panic=-1 systemd.show_status=false net.ifnames=0' \
    -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" &
machine=$!
trap 'kill "$machine" 2> /dev/null || true' EXIT
# It is not waited for to power down: all that matters has been said.
while kill -0 "$machine" 2> /dev/null && ! grep -aq '^ok   all' "$log"; do
    sleep 1
done

tr -d '\r' < "$log" | grep -aE '^(ok|FAIL|told) ' || true
if ! grep -aq '^ok   all' "$log" || grep -aq '^FAIL' "$log"; then
    echo "systemd.sh: failed: see $log" >&2
    exit 1
fi

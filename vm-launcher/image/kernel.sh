# Read by build.sh and debian.sh: the kernel's package, its modules, and packing an initramfs. They give $out (with a
# cache), $work, $root (where packages are unpacked to) and $image (the initramfs' files), say and die.

# The newest package whose name matches, or nothing.
newest() { apt-cache pkgnames linux-image- | grep -E "$1" | sort -V | tail -n 1; }
kernel_package() {
    for pattern in '^linux-image-6\.12\.[0-9.]+(\+deb[0-9]+)?-cloud-amd64$' \
        '^linux-image-[0-9][0-9.+a-z-]*-cloud-amd64$' '^linux-image-[0-9][0-9.-]*-generic$'; do
        found=$(newest "$pattern")
        [ -z "$found" ] || { echo "$found"; return; }
    done
}

# find_kernel sets $kernel, the package, and $version.
find_kernel() {
    kernel=$(kernel_package)
    if [ -z "$kernel" ]; then
        say "no kernel in the package lists; updating them"
        apt-get -qq update || die "apt-get update failed: check /etc/apt/sources.list and the network"
        kernel=$(kernel_package)
    fi
    [ -n "$kernel" ] || die "no linux-image-*-cloud-amd64 or linux-image-*-generic in the package lists"
    version=${kernel#linux-image-}
}

# fetch PACKAGE... downloads packages into the cache and unpacks them into $root.
fetch() {
    # Ubuntu keeps the modules in a package of their own.
    if apt-cache show "linux-modules-$version" >/dev/null 2>&1; then
        set -- "$@" "linux-modules-$version"
    fi

    say "downloading $# packages, kernel $version"
    sandbox=
    [ "$(id -u)" != 0 ] || sandbox="-o APT::Sandbox::User=root"
    # apt-get verifies what it downloads and what the cache already holds.
    (cd "$out/cache" && apt-get -qq $sandbox download "$@" >"$work/apt.log" 2>&1) ||
        { cat "$work/apt.log" >&2; die "cannot download the packages: run apt-get update and try again"; }

    say "unpacking"
    for package in "$@"; do
        newest_file=$(ls -t "$out/cache/${package}_"*.deb 2>/dev/null | head -n 1)
        [ -n "$newest_file" ] || die "apt-get left no $package in $out/cache"
        dpkg -x "$newest_file" "$root"
    done
}

# Puts a module and, before it, what it depends on into the image and the loading order.
add_module() {
    if grep -qx "$1" "$image/lib/modules/order"; then return; fi
    pattern=$(echo "$1" | sed 's/[_-]/[_-]/g')
    if grep -q "/$pattern\.ko$" "$builtin"; then return; fi
    file=$(grep -E "/$pattern\.ko(\.xz|\.zst)?$" "$work/files" | head -n 1)
    if [ -z "$file" ]; then
        [ "$2" != required ] || die "kernel $version has no module $1"
        say "kernel $version has no module $1, which is optional"
        return
    fi
    target=$image/lib/modules/$1.ko
    case $file in
    *.xz) "$busybox" xzcat "$file" >"$target" ;;
    *.zst) zstd -dcq "$file" >"$target" || die "cannot unpack $file: install zstd" ;;
    *) cp "$file" "$target" ;;
    esac
    for needed in $(tr '\0' '\n' <"$target" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "$(echo "$needed" | tr - _)" required
    done
    echo "$1" >>"$image/lib/modules/order"
}

# collect_modules LIST puts the modules of LIST, and the order to load them in, into $image.
collect_modules() {
    say "collecting modules"
    modules=$(find "$root" -type d -path "*lib/modules/$version" | head -n 1)
    [ -n "$modules" ] || die "$kernel holds no modules"
    find "$modules" -name '*.ko*' >"$work/files"
    builtin=$modules/modules.builtin
    : >"$image/lib/modules/order"
    while read -r module necessity; do
        case $module in '' | '#'*) continue ;; esac
        add_module "$module" "$necessity"
    done <"$1"
}

# pack makes $work/initrd.img of $image, and $work/vmlinuz.
pack() {
    # Names, owners and times that do not depend on who builds when, so that equal inputs give an
    # equal image.
    find "$image" -exec touch -h -d @0 {} +
    (cd "$image" && find . | sort | "$busybox" cpio -o -H newc -R 0:0 --renumber-inodes --ignore-devno) \
        >"$work/initrd.img" 2>/dev/null || die "cannot pack $work/initrd.img"
    cp -L "$(ls "$root"/boot/vmlinuz-* | head -n 1)" "$work/vmlinuz"
    # -n keeps the name and the time out of it.
    gzip -9n "$work/initrd.img" && mv "$work/initrd.img.gz" "$work/initrd.img"
}

//! Bad command lines: exit code 2, one line, and nothing touched. None of these needs root.

use crate::run::{command, fed, omerta};

const ATTACH: &str =
    "guard attach omnone0 --mac 52:54:00:00:00:01 --ip 10.77.0.2 --gateway 10.77.0.1";

#[test]
fn malformed_endpoint_is_named_with_its_cause() {
    for (endpoint, cause) in [
        ("sctp:192.0.2.1:1", "the protocol must be udp, tcp or icmp"),
        ("udp:192.0.2.1", "the port must be a number from 1 to 65535"),
        (
            "udp:192.0.2.1:0",
            "the port must be a number from 1 to 65535",
        ),
        (
            "udp:192.0.2.1:65536",
            "the port must be a number from 1 to 65535",
        ),
        ("udp:2001:db8::1:1", "IPv6 in brackets"),
        ("udp:consumer.example:1", "the address must be IPv4"),
        ("icmp:192.0.2.1:1", "icmp has no port"),
        ("udp:127.0.0.1:1", "the address must be unicast"),
    ] {
        for line in [
            format!("{ATTACH} --allow {endpoint}"),
            format!("guard allow omnone0 {endpoint}"),
            format!("guard revoke omnone0 udp:192.0.2.1:1 {endpoint}"),
        ] {
            omerta(&line).failed(2, &[endpoint, cause]);
        }
    }
}

#[test]
fn contradictions_between_options_are_refused() {
    let attach = |options: &str| omerta(&format!("guard attach omnone0 {options}"));
    let one = "--mac 52:54:00:00:00:01 --ip 10.77.0.2 --gateway 10.77.0.1";
    for (options, words) in [
        (
            "--mac 01:00:5e:00:00:01 --ip 10.77.0.2 --gateway 10.77.0.1",
            &["--mac 01:00:5e:00:00:01", "not unicast"][..],
        ),
        (
            "--mac 00:00:00:00:00:00 --ip 10.77.0.2 --gateway 10.77.0.1",
            &["--mac 00:00:00:00:00:00", "not unicast"],
        ),
        (
            "--mac 52:54:00:00:00:01 --ip 224.0.0.1 --gateway 10.77.0.1",
            &["--ip 224.0.0.1", "unicast"],
        ),
        (
            "--mac 52:54:00:00:00:01 --ip 10.77.0.2 --gateway 127.0.0.1",
            &["--gateway 127.0.0.1", "unicast"],
        ),
        (
            "--mac 52:54:00:00:00:01 --ip 10.77.0.2 --gateway 10.77.0.2",
            &["10.77.0.2 is both --ip and --gateway"],
        ),
        (
            &format!("{one} --gateway-mac ff:ff:ff:ff:ff:ff"),
            &["--gateway-mac ff:ff:ff:ff:ff:ff", "not unicast"],
        ),
        (
            &format!("{one} --gateway-mac 52:54:00:00:00:01"),
            &["--gateway-mac 52:54:00:00:00:01", "--mac"],
        ),
        (
            &format!("{one} --ip 10.77.0.2"),
            &["--ip 10.77.0.2 is given twice"],
        ),
        (
            &format!("{one} --gateway 10.77.0.1"),
            &["--gateway 10.77.0.1 is given twice"],
        ),
        (
            &format!("{one} --gateway 10.77.0.3"),
            &["--gateway 10.77.0.3 is a second IPv4 gateway"],
        ),
        (
            &format!("{one} --ip 2001:db8::2"),
            &["--ip 2001:db8::2", "add --gateway with an IPv6 address"],
        ),
        (
            &format!("{one} --gateway 2001:db8::1"),
            &["--gateway 2001:db8::1", "no --ip of its family"],
        ),
    ] {
        attach(options).failed(2, words);
    }
    let many: String = (0..8).map(|n| format!(" --ip 10.77.0.1{n}")).collect();
    attach(&format!("{one}{many}")).failed(2, &["--ip is given 9 times", "at most 8"]);
}

#[test]
fn malformed_values_are_named() {
    for (line, words) in [
        (
            "guard attach omnone0 --mac 52:54 --ip 10.77.0.2 --gateway 10.77.0.1",
            &["52:54", "--mac", "six hex pairs"][..],
        ),
        (
            "guard attach omnone0 --mac 52:54:00:00:00:01 --ip 10.77.0 --gateway 10.77.0.1",
            &["10.77.0", "--ip"],
        ),
        (
            &format!("{ATTACH} --mode fast"),
            &["fast", "filtered, conntrack, sampled or direct"],
        ),
        ("guard show a/b", &["a/b", "no slash"]),
        ("guard show ..", &["..", "no slash"]),
        ("guard show omnone0 -o xml", &["xml", "text", "json"]),
        ("vm show Alpha", &["Alpha", "a-z"]),
        (
            "vm run --name a --image i --consumer k@192.0.2.1:1",
            &["k@192.0.2.1:1", "44 characters of base64"],
        ),
        (
            "vm run --spec /nonexistent/guest.toml",
            &["/nonexistent/guest.toml", "TOML or JSON"],
        ),
        ("vm run --spec /dev/null", &["/dev/null", "name"]),
        (
            "vm run --spec /dev/null --label a=b --label a=c",
            &["--label a", "twice"],
        ),
        (
            "vm run --spec /dev/null --label plan",
            &["plan", "NAME=VALUE"],
        ),
        ("vm run --spec /dev/null --timeout 0", &["--timeout"]),
        ("vm stop a --deadline 0", &["--deadline", "1..=600"]),
        ("events --guest A/b", &["A/b", "a-z"]),
    ] {
        omerta(line).failed(2, words);
    }
}

#[test]
fn missing_and_unknown_arguments_name_the_command_to_ask() {
    omerta("guard attach omnone0").failed(
        2,
        &[
            "--mac",
            "--ip",
            "--gateway",
            "see `omerta guard attach --help`",
        ],
    );
    omerta("guard allow omnone0")
        .failed(2, &["PROTO:ADDR:PORT", "see `omerta guard allow --help`"]);
    omerta("guard shew").failed(2, &["shew", "show"]);
    omerta("guard show omnone0 --json").failed(2, &["--json"]);
    omerta("vm run --name a --image i").failed(2, &["--consumer", "see `omerta vm run --help`"]);
}

#[test]
fn hostile_argument_cannot_break_out_of_its_line() {
    let mut command = command("guard show");
    command.arg("a\n\x1b[31mb\x07");
    let ran = fed(command, b"").failed(2, &["an interface's name"]);
    assert!(!ran.stderr.trim_end().contains(char::is_control), "{ran:?}");
}

#[test]
fn tunnel_ends_must_be_able_to_speak() {
    let run = "vm run --name a --image i --consumer AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=@192.0.2.10:51820";
    omerta(&format!(
        "{run} --tunnel-address 10.66.0.2/24 --tunnel-peer 10.67.0.1"
    ))
    .failed(2, &["--tunnel-peer 10.67.0.1", "10.66.0.2/24"]);
    omerta(&format!(
        "{run} --tunnel-address 10.66.0.2/24 --tunnel-peer 10.66.0.2"
    ))
    .failed(2, &["--tunnel-peer 10.66.0.2", "the consumer's own"]);
    omerta(&format!("{run} --tunnel-address 10.66.0.2")).failed(2, &["10.66.0.2", "prefix"]);
}

#[test]
fn allowlist_with_a_bad_line_is_refused_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("list");
    std::fs::write(
        &file,
        "# consumers\nudp:192.0.2.1:51820\n\nudp:192.0.2.1:0\n",
    )
    .unwrap();
    let file = file.display();
    omerta(&format!("guard replace omnone0 --file {file}")).failed(
        2,
        &[
            &format!("{file}, line 4"),
            "udp:192.0.2.1:0",
            "the port must be",
            "nothing was changed",
        ],
    );
    fed(
        command("guard replace omnone0 --file -"),
        b"udp:192.0.2.1:1\n\xff\n",
    )
    .failed(2, &["standard input, line 2", "not text"]);
    omerta(&format!(
        "guard replace omnone0 --file {}",
        dir.path().join("none").display()
    ))
    .failed(3, &["none", "give the allowlist's path"]);
}

#[test]
fn help_goes_to_stdout_and_a_bare_command_prints_it() {
    for line in [
        "--help",
        "guard --help",
        "guard attach --help",
        "vm run --help",
        "--version",
    ] {
        let ran = omerta(line).done();
        assert!(!ran.stdout.is_empty(), "{line}");
    }
    for line in ["", "guard", "vm"] {
        let ran = omerta(line);
        assert_eq!(ran.code, 2, "{line}");
        assert!(ran.stderr.contains("Usage: omerta"), "{line}");
    }
}

#[test]
fn file_that_is_no_allowlist_is_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let replace = |path: &str| omerta(&format!("guard replace omnone0 --file {path}"));
    let here = dir.path().display().to_string();
    replace(&here).failed(2, &[&here, "is a directory", "one endpoint a line"]);
    // Its first page cannot be read, by root either.
    replace("/proc/self/mem").failed(1, &["/proc/self/mem", "give a readable file"]);
    replace("/dev/zero").failed(2, &["/dev/zero", "longer than 64 MiB"]);
    std::fs::write(path("utf16"), b"\xff\xfeu\0d\0p\0").unwrap();
    replace(&path("utf16")).failed(2, &["utf16, line 1", "save the file as UTF-8"]);
    // A byte order mark and carriage returns are no error: the interface is what is missing.
    std::fs::write(path("bom"), "\u{feff}udp:192.0.2.1:1\r\n\r\n").unwrap();
    let ran = replace(&path("bom"));
    assert!(!ran.stderr.contains("line 1"), "{ran:?}");
}

#[test]
fn network_in_place_of_an_address_is_refused() {
    let attach = "guard attach omnone0 --mac 52:54:00:00:00:01";
    omerta(&format!("{attach} --ip 10.77.0.2/24 --gateway 10.77.0.1")).failed(
        2,
        &["10.77.0.2/24", "--ip", "give the one address, 10.77.0.2"],
    );
    omerta(&format!("{attach} --ip 10.77.0.2 --gateway 2001:db8::1/64"))
        .failed(2, &["2001:db8::1/64", "give the one address, 2001:db8::1"]);
}

#[test]
fn endpoint_that_could_never_be_reached_is_refused() {
    omerta(&format!("{ATTACH} --allow udp:[2001:db8::1]:1"))
        .failed(2, &["--allow udp:[2001:db8::1]:1", "--ip of its family"]);
    omerta(&format!("{ATTACH} --allow udp:10.77.0.2:1"))
        .failed(2, &["--allow udp:10.77.0.2:1", "own address"]);
}

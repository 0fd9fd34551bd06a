//! `omerta capture` on a real guarded tap.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_kernel_tests::{Ipv4, arp, ethernet, udp};
use omerta_verdict::Mac;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;

use crate::guard::{GUEST, Stage};
use crate::run::omerta;

const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 0xfe]);

fn stage() -> Option<Stage> {
    let stage = Stage::set()?;
    stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.10:51820"))
        .done();
    Some(stage)
}

fn datagram(to: [u8; 4]) -> Vec<u8> {
    let packet = Ipv4::new([10, 77, 0, 2].into(), to.into(), 17).packet(&udp(1, 51820, b"x"));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

fn question() -> Vec<u8> {
    let question = arp(
        1,
        (GUEST_MAC, [10, 77, 0, 2].into()),
        (GATEWAY_MAC, [10, 77, 0, 1].into()),
    );
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0806, &question)
}

const CONSUMER: [u8; 4] = [192, 0, 2, 10];
const STRANGER: [u8; 4] = [198, 51, 100, 1];

/// A capture that has begun.
struct Running {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn begin(stage: &Stage, options: &str) -> Self {
        let mut child = stage
            .command(&format!("capture {} {options}", stage.name))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains("capturing on"), "{line}");
        Self { child, stderr }
    }

    /// How it ended: exit code and what it had to say.
    fn ended(mut self) -> (i32, String, Vec<u8>) {
        let mut stdout = Vec::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut stdout)
            .unwrap();
        let mut told = String::new();
        self.stderr.read_to_string(&mut told).unwrap();
        (
            self.child.wait().unwrap().code().unwrap_or(-1),
            told,
            stdout,
        )
    }
}

/// Direction and comment of each packet of a capture.
fn packets(stream: impl Read) -> Vec<(u32, String, usize)> {
    let mut reader = PcapNgReader::new(stream).unwrap();
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            packets.push(annotations(&packet));
        }
    }
    packets
}

fn annotations(packet: &EnhancedPacketBlock<'_>) -> (u32, String, usize) {
    let (mut flags, mut comment) = (0, String::new());
    for option in &packet.options {
        match option {
            EnhancedPacketOption::Flags(word) => flags = *word,
            EnhancedPacketOption::Common(CommonOption::Comment(text)) => comment = text.to_string(),
            _ => {}
        }
    }
    (flags, comment, packet.data.len())
}

fn tcpdump(path: &Path) -> String {
    let output = Command::new("tcpdump")
        .args(["-nn", "-r"])
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn each_frame_is_recorded_with_what_became_of_it_and_tcpdump_reads_it() {
    let Some(stage) = stage() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace.pcapng");
    let capture = Running::begin(&stage, &format!("-w {} --count 4", path.display()));
    for frame in [datagram(CONSUMER), datagram(STRANGER), question()] {
        stage.tap.send(&frame).unwrap();
    }
    let (code, told, _) = capture.ended();
    assert_eq!(code, 0, "{told}");
    assert!(
        told.contains("4 frames kept of 4 seen") && told.contains("0 lost"),
        "{told}"
    );
    let recorded = packets(File::open(&path).unwrap());
    let told: Vec<_> = recorded
        .iter()
        .map(|(way, text, _)| (*way, text.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (1, "allowed (judged natively, epoch 1)"),
            (1, "dropped: endpoint (judged natively, epoch 1)"),
            (1, "answered (judged natively, epoch 1)"),
            (2, "allowed (seen behind the guard)"),
        ]
    );
    let shown = tcpdump(&path);
    assert_eq!(shown.lines().count(), 4, "{shown}");
    assert!(
        shown.contains("10.77.0.2.1 > 198.51.100.1.51820"),
        "{shown}"
    );
    // The kernel, which knew nothing of the capture, has judged the same.
    let counters = stage.shown();
    assert_eq!(counters["egress"]["allowed"], 1);
    assert_eq!(counters["egress"]["answered"], 1);
    assert_eq!(counters["egress"]["dropped"]["endpoint"], 1);
}

#[test]
fn only_what_is_asked_for_is_kept_and_no_more_of_it() {
    let Some(stage) = stage() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace.pcapng");
    let options = "--verdict dropped --reason endpoint --snaplen 20 --count 1";
    let capture = Running::begin(&stage, &format!("-w {} {options}", path.display()));
    let mut forged = datagram(CONSUMER);
    forged[11] = 9;
    for frame in [datagram(CONSUMER), forged, datagram(STRANGER)] {
        stage.tap.send(&frame).unwrap();
    }
    assert_eq!(capture.ended().0, 0);
    let recorded = packets(File::open(&path).unwrap());
    assert_eq!(recorded.len(), 1);
    assert!(
        recorded[0].1.starts_with("dropped: endpoint"),
        "{recorded:?}"
    );
    assert_eq!(recorded[0].2, 20);
}

#[test]
fn a_reader_of_the_stream_sees_each_frame_at_once() {
    let Some(stage) = stage() else { return };
    let mut capture = Running::begin(&stage, "-w -");
    stage.tap.send(&datagram(STRANGER)).unwrap();
    // The capture goes on: what is read here was not held back.
    let mut stdout = capture.child.stdout.take().unwrap();
    let mut reader = PcapNgReader::new(&mut stdout).unwrap();
    let packet = loop {
        if let Block::EnhancedPacket(packet) = reader.next_block().unwrap().unwrap() {
            break annotations(&packet);
        }
    };
    assert!(packet.1.starts_with("dropped: endpoint"), "{packet:?}");
    let pid = Pid::from_raw(capture.child.id() as i32);
    kill(pid, Signal::SIGINT).unwrap();
    assert!(capture.child.wait().unwrap().success());
}

#[test]
fn frames_are_shown_one_a_line_and_counted_where_they_come_too_fast() {
    let Some(stage) = stage() else { return };
    let capture = Running::begin(&stage, "-o json --rate 2");
    for _ in 0..5 {
        stage.tap.send(&datagram(STRANGER)).unwrap();
    }
    // Its guard goes, and the capture with it.
    stage.guard("detach", "").done();
    let (code, told, stdout) = capture.ended();
    assert_eq!(code, 0, "{told}");
    assert!(
        told.contains("2 frames kept of 5 seen; 3 beyond the rate"),
        "{told}"
    );
    let lines: Vec<Value> = stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["verdict"], "dropped");
    assert_eq!(lines[0]["reason"], "endpoint");
    assert_eq!(lines[0]["frame"], "udp 10.77.0.2:1 → 198.51.100.1:51820");
}

#[test]
fn what_cannot_be_captured_is_said() {
    omerta("capture no-such-tap").failed(3, &["no-such-tap"]);
    omerta("capture tap0 --reason nonsense").failed(2, &["omerta guard reasons"]);
    omerta("capture tap0 --ring 1kB").failed(2, &["256KiB"]);
    let Some(stage) = Stage::set() else { return };
    stage
        .omerta("capture omt0")
        .failed(3, &["omt0 has no guard"]);
    stage.guard("attach", GUEST).done();
    stage
        .omerta("capture omt0 -w /nonexistent/trace")
        .failed(1, &["/nonexistent/trace"]);
}

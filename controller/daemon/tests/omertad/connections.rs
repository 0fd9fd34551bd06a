//! Connections that ask for nothing, or for too much.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use omerta_test_support::IDLE;

use crate::daemon::{Daemon, command, exchange, namespace};
use crate::guests::{give_image, request, run};

const MANY: usize = 2000;

fn allow_many_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > 2 * MANY as u64 + 500, "this test opens {MANY} twice");
}

#[test]
fn idle_connections_keep_nobody_out_and_harm_no_guest() {
    allow_many_descriptors();
    let daemon = Daemon::start_with(tempfile::tempdir().unwrap(), &["--metrics", "127.0.0.1:0"]);
    give_image(&daemon, IDLE);
    run(&daemon, "alpha");
    let before = daemon.descriptors();
    let api: Vec<_> = (0..MANY)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    let metrics: Vec<_> = (0..MANY).map(|_| daemon.connect_to_metrics()).collect();
    let listed = daemon.get("/v1/guests").json();
    assert_eq!(listed["guests"][0]["state"], "running", "{listed}");
    let scraped = exchange(daemon.connect_to_metrics(), "GET", "/metrics", "");
    assert_eq!(scraped.status, 200, "{scraped:?}");
    let during = daemon.descriptors();
    println!("measured: {before} descriptors before, {during} with {MANY} idle connections twice");
    assert!(during < MANY, "{during}");
    run(&daemon, "beta");
    drop((api, metrics));
    for name in ["alpha", "beta"] {
        let shown = daemon.get(&format!("/v1/guests/{name}")).json();
        assert_eq!(shown["state"], "running", "{shown}");
    }
}

#[test]
fn request_that_does_not_end_is_closed() {
    let daemon = Daemon::start_with(tempfile::tempdir().unwrap(), &["--metrics", "127.0.0.1:0"]);
    let head = "POST /v1/guests HTTP/1.1\r\nhost: x\r\n";
    let unfinished = [
        head.to_owned(),
        format!("{head}content-length: 100\r\n\r\n{{"),
    ];
    let mut open = Vec::new();
    for part in &unfinished {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(part.as_bytes()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        open.push(stream);
    }
    let mut metrics = daemon.connect_to_metrics();
    metrics.write_all(head.as_bytes()).unwrap();
    metrics
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answer = Vec::new();
    for mut stream in open {
        closed(stream.read_to_end(&mut answer));
    }
    closed(metrics.read_to_end(&mut answer));
}

fn closed(read: std::io::Result<usize>) {
    // A socket that is closed with something unread is reset.
    if let Err(error) = read {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
}

#[test]
fn event_streams_are_bounded_and_go_on() {
    let daemon = Daemon::start();
    let follow = || {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let head = "GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        let mut lines = BufReader::new(stream);
        let mut status = String::new();
        lines.read_line(&mut status).unwrap();
        (status, lines)
    };
    let mut streams = Vec::new();
    let refusal = loop {
        let (status, stream) = follow();
        if status.contains(" 409 ") {
            break stream;
        }
        assert!(status.contains(" 200 "), "{status}");
        streams.push(stream);
        assert!(streams.len() < MANY, "there is a bound");
    };
    let told = refusal.lines().map_while(Result::ok);
    assert!(told.into_iter().any(|line| line.contains("event streams")));
    // Connections that ask for nothing send no stream away.
    let idle: Vec<_> = (0..500)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    let lost = daemon.post("/v1/guests", &request("alpha", "absent"));
    assert_eq!(lost.status, 404, "{lost:?}");
    give_image(&daemon, IDLE);
    run(&daemon, "alpha");
    drop(idle);
    for stream in streams {
        let heard = stream.lines().map_while(Result::ok);
        assert!(heard.into_iter().any(|line| line.contains("alpha")));
    }
}

#[test]
fn guest_for_whom_there_are_too_few_descriptors_is_refused_and_what_is_short_named() {
    let directory = tempfile::tempdir().unwrap();
    let namespace = namespace();
    let program = command(&namespace, directory.path());
    let mut limited = namespace.command("prlimit");
    limited.arg("--nofile=500:500").arg(program.get_program());
    limited.args(program.get_args()).args(["--metrics", "off"]);
    let daemon = Daemon::start_by(limited, namespace, directory);
    give_image(&daemon, IDLE);
    assert!(daemon.log().contains("500 open files"), "{}", daemon.log());
    let mut running = 0;
    let message = loop {
        let name = format!("g{running}");
        let answer = daemon.post("/v1/guests", &request(&name, "bare"));
        if answer.status != 201 {
            break answer.refusal(409, "refused");
        }
        running += 1;
        assert!(running < 30, "no more than there is room for");
    };
    assert!(message.contains("500 open files"), "{message}");
    assert!(running > 0);
    println!(
        "measured: {} descriptors with {running} guests",
        daemon.descriptors()
    );
    assert_eq!(daemon.post("/v1/guests/g0/kill", "").status, 200);
    run(&daemon, "next");
}

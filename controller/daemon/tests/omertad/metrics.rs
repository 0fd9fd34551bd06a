//! The metrics endpoint.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::daemon::{Answer, Daemon, exchange};

fn scrape(daemon: &Daemon, path: &str) -> Answer {
    exchange(daemon.connect_to_metrics(), "GET", path, "")
}

fn start() -> Daemon {
    Daemon::start_with(tempfile::tempdir().unwrap(), &["--metrics", "127.0.0.1:0"])
}

#[test]
fn scrape_is_prometheus_text_and_every_family_is_explained() {
    let daemon = start();
    let answer = scrape(&daemon, "/metrics");
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .headers
            .contains("content-type: text/plain; version=0.0.4"),
        "{answer:?}"
    );
    let mut explained: BTreeMap<&str, (bool, bool)> = BTreeMap::new();
    for line in answer.body.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (family, text) = help.split_once(' ').unwrap();
            assert!(text.ends_with('.'), "{line}");
            explained.entry(family).or_default().0 = true;
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            explained
                .entry(kind.split(' ').next().unwrap())
                .or_default()
                .1 = true;
        } else {
            let family = line.split(['{', ' ']).next().unwrap();
            assert_eq!(explained.get(family), Some(&(true, true)), "{line}");
            let value = line.rsplit(' ').next().unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
        }
    }
    let build = format!(
        "omerta_build_info{{version=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION")
    );
    assert!(
        answer.body.lines().any(|line| line == build),
        "{}",
        answer.body
    );
    assert!(
        answer
            .body
            .contains("omerta_events_lost_total{where=\"reader\"} 0"),
        "{}",
        answer.body
    );
}

/// Prometheus' own judgement of the format and the names; `make setup` brings promtool.
#[test]
fn scrape_satisfies_promtool() {
    let ours = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../target/tools/bin/promtool"
    );
    let check = |program: &str| {
        Command::new(program)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let Ok(mut promtool) = check("promtool").or_else(|_| check(ours)) else {
        println!("skipped: promtool is missing, which 'make setup' brings");
        return;
    };
    let body = scrape(&start(), "/metrics").body;
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(body.as_bytes()).unwrap();
    drop(input);
    let judged = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&judged.stderr);
    assert!(judged.status.success() && said.is_empty(), "{said}\n{body}");
}

#[test]
fn nothing_but_metrics_is_answered_there() {
    let daemon = start();
    for path in ["/", "/v1/guests", "/v1/version"] {
        assert_eq!(scrape(&daemon, path).status, 404, "{path}");
    }
}

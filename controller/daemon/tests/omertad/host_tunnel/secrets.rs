//! A preshared key is used, and nobody is told of it.

use std::fs;

use super::*;

/// Every file below a directory, and what processes were called with and in what environment.
fn all_that_is_kept(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => directories.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    for process in fs::read_dir("/proc").unwrap() {
        let path = process.unwrap().path();
        found.extend(["cmdline", "environ"].map(|file| path.join(file)));
    }
    let read = |path: PathBuf| fs::read(&path).ok().map(|bytes| (path, bytes));
    found.into_iter().filter_map(read).collect()
}

fn metrics(daemon: &Daemon) -> String {
    let mut stream = daemon.connect_to_metrics();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_preshared_key_must_be_the_consumers_and_is_nowhere_to_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("omertad.toml");
    fs::write(&config, "[tunnel]\nanswer_seconds = 8\n").unwrap();
    let config = config.to_str().unwrap().to_owned();
    let arguments = ["--metrics", "127.0.0.1:0", "--config", &config];
    let daemon = Daemon::start_with(directory, &arguments);
    give_image(&daemon, IDLE);
    let mut consumer = Consumer::of(&daemon, 1);
    // The guest has one and the consumer has none for it.
    let key = Secret::generate().unwrap();
    let text = key.base64();
    let mut request = consumer.request("alpha", "bare");
    request["preshared_key"] = text.as_str().into();
    let answer = std::thread::scope(|threads| {
        let asked = threads.spawn(|| daemon.post("/v1/guests", &request.to_string()));
        consumer.welcome(key_of(&daemon, "alpha"));
        asked.join().unwrap()
    });
    let message = answer.refusal(409, "refused");
    assert!(message.contains("has not shaken hands"), "{message}");
    // Both have it.
    consumer.preshared_key = Some(key.clone());
    let answer = consumer.run(&daemon, "beta", "bare");
    assert_eq!(answer.status, 201, "{answer:?}\n{}", daemon.log());
    said_of(&daemon, "beta", "host");
    // A malformed one is refused, and not quoted.
    request["preshared_key"] = Value::from(&text[1..]);
    let answer = daemon.post("/v1/guests", &request.to_string());
    assert!(answer.refusal(400, "usage").contains("preshared_key"));
    let refusal = answer.body;
    let mut told: Vec<(PathBuf, Vec<u8>)> = [
        "/v1/guests?ended=true",
        "/v1/guests/alpha",
        "/v1/guests/beta",
        "/v1/peers",
        "/v1/events",
        "/v1/version",
    ]
    .map(|path| (path.into(), daemon.get(path).body.into_bytes()))
    .into();
    told.push(("the refusal".into(), refusal.into_bytes()));
    let metrics = metrics(&daemon);
    assert!(
        metrics.contains("omerta_tunnel_handshake_age_seconds{guest=\"beta\",witness=\"host\"}"),
        "{metrics}"
    );
    told.push(("/metrics".into(), metrics.into_bytes()));
    told.extend(all_that_is_kept(daemon.path()));
    // That it is looked for where it would be.
    assert!(
        told.iter().any(|(path, _)| path.ends_with("guests.db")),
        "the store is not read"
    );
    let hex: String = key
        .expose()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    for (path, bytes) in told {
        for secret in [&text.as_bytes()[1..43], hex.as_bytes(), &key.expose()[..]] {
            let found = bytes.windows(secret.len()).any(|part| part == secret);
            assert!(!found, "{}", path.display());
        }
    }
    assert_eq!(daemon.post("/v1/guests/beta/kill", "").status, 200);
}

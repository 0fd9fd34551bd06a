//! What omertad tells Prometheus.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use omerta_test_support::Namespace;

use crate::daemon::METRICS;

/// One sample.
pub struct Sample {
    pub line: String,
    name: String,
    labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    /// Whether this is a sample of a metric, with these labels among others.
    pub fn is(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        let has = |wanted: &(&str, &str)| {
            self.labels
                .iter()
                .any(|(key, value)| (key.as_str(), value.as_str()) == *wanted)
        };
        self.name == name && labels.iter().all(has)
    }

    fn parse(line: &str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}')?),
            None => (series, ""),
        };
        // No label of omertad's holds a comma or an escape.
        let pairs = labels.split(',').filter_map(|pair| pair.split_once('='));
        let labels = pairs
            .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
            .collect();
        Some(Self {
            line: line.to_owned(),
            name: name.to_owned(),
            labels,
            value: value.parse().ok()?,
        })
    }
}

/// Fetches the metrics, as Prometheus on the provider would.
pub fn fetch(provider: &Namespace) -> Result<Vec<Sample>> {
    let text = provider
        .enter(get)?
        .with_context(|| format!("cannot fetch http://{METRICS}/metrics"))?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("the metrics came without an HTTP header")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!(
            "http://{METRICS}/metrics answered: {}",
            head.lines().next().unwrap_or_default()
        );
    }
    Ok(body
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(Sample::parse)
        .collect())
}

fn get() -> std::io::Result<String> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: {METRICS}\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_is_found_by_its_labels() {
        let sample = Sample::parse(r#"packets{guest="a",reason="endpoint"} 3"#).unwrap();
        assert!(sample.is("packets", &[("reason", "endpoint"), ("guest", "a")]));
        assert!(!sample.is("packets", &[("reason", "vlan")]));
        assert!(!sample.is("bytes", &[]));
        assert_eq!(sample.value, 3.0);
        assert!(Sample::parse("up 1").unwrap().is("up", &[]));
    }
}

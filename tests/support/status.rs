//! The status endpoint of a running sidecar, as a client sees it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::binary;
use super::cloud::Cloud;
use super::sidecar::{PATIENCE, Running, Sidecar};

/// A sidecar with a status endpoint and short waits.
pub fn sidecar(cloud: &Cloud) -> Sidecar {
    binary::sidecar(cloud)
        .env("LISTEN_ADDRESS", "127.0.0.1:0")
        .env("DEVICE_REFRESH_RATE", "1s")
        .env("EXPORTERS", "node:80")
        .env("OWN_TAGS", "all")
}

/// A sidecar that listens, and where.
pub struct Status {
    pub running: Running,
    pub address: SocketAddr,
}

impl Status {
    pub fn start(sidecar: &Sidecar) -> Self {
        Self::of(sidecar.start())
    }

    /// A sidecar that runs already.
    pub fn of(running: Running) -> Self {
        let line = running.wait_for("status on http://");
        let address = line.rsplit_once("http://").unwrap().1.parse().expect("an address");
        Status { running, address }
    }

    /// Status, head in lower case, and body.
    pub fn get(&self, path: &str) -> (u16, String, Vec<u8>) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
    }

    pub fn send(&self, request: &str) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("it answers and closes");
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").expect("a head");
        let mut body = answer.split_off(head + 4);
        let head = String::from_utf8(answer).expect("text").to_lowercase();
        if head.contains("transfer-encoding: chunked\r\n") && !request.starts_with("HEAD ") {
            body = unchunked(&body);
        }
        (head.split(' ').nth(1).unwrap().parse().expect("a status"), head, body)
    }

    pub fn text(&self, path: &str) -> String {
        let (status, head, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {head}");
        String::from_utf8(body).expect("UTF-8")
    }

    /// Samples of `/metrics`, by name and labels.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let sample = |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap()));
        self.text("/metrics").lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
    }

    /// Waits until the metrics are such.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&BTreeMap<String, f64>) -> bool) -> BTreeMap<String, f64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let metrics = self.metrics();
            if is_so(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < deadline, "{what}: {metrics:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What the chunks of a body hold.
fn unchunked(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let parsed = httparse::parse_chunk_size(chunks).expect("a chunk");
        let httparse::Status::Complete((start, size)) = parsed else { panic!("the body breaks off") };
        let (chunk, rest) = chunks[start..].split_at(usize::try_from(size).expect("a size"));
        body.extend_from_slice(chunk);
        chunks = rest.strip_prefix(b"\r\n").expect("the end of a chunk");
        if chunk.is_empty() {
            return body;
        }
    }
}

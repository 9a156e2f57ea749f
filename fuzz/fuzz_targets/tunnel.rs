//! Any bytes as what comes through balena's VPN proxy: the first line of the input is its answer to `CONNECT`, the rest that of the
//! device. The real tunnel runs in this process: it answers each scrape in time, and the process does not end.
#![no_main]

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use baletheus::cli;

const TARGET: &str = "00000000000000000000000000000001.balena:9100";
/// The time-out of a scrape, in seconds.
const TIMEOUT: f64 = 0.2;
/// The longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the VPN proxy sends next.
static ANSWER: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// Answers each connection after its first bytes, and closes it.
fn vpn() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let answer = ANSWER.lock().expect("the answer").clone();
            thread::spawn(move || {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                // the tunnel may have closed
                let _ = stream.write_all(&answer);
            });
        }
    });
    address
}

fn tunnel() -> SocketAddr {
    let folder = std::env::temp_dir().join(format!("baletheus-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let (list, key) = (folder.join("balena.json"), folder.join("key"));
    fs::write(&list, format!("[{{\"targets\":[\"{TARGET}\"]}}]")).expect("a target file");
    fs::write(&key, "a-key").expect("a key");
    let (address, url) = (free_port(), format!("http://{}", vpn()));
    let path = |path: &std::path::Path| path.display().to_string();
    let mut args = vec!["baletheus".to_owned(), "tunnel".into(), "--listen".into(), address.to_string()];
    args.extend(["--tunnel-url".into(), url, "--sd-file".into(), path(&list), "--api-key-file".into(), path(&key)]);
    args.extend(["--log-level".into(), "off".into()]);
    let args: Vec<_> = args.into_iter().map(OsString::from).collect();
    thread::spawn(move || panic!("the tunnel ends: {:?}", cli::main(args)));
    let start = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(start.elapsed() < PATIENCE, "the tunnel does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    address
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TUNNEL: OnceLock<SocketAddr> = OnceLock::new();
    let address = *TUNNEL.get_or_init(tunnel);
    // Half of the inputs are an answer of the device alone.
    let mut answer = if bytes.len() % 2 == 0 { b"HTTP/1.0 200 Connection Established\r\n\r\n".to_vec() } else { Vec::new() };
    answer.extend_from_slice(bytes);
    *ANSWER.lock().expect("the answer") = answer;
    let start = Instant::now();
    let mut stream = TcpStream::connect(address).expect("the tunnel listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    let request = format!(
        "GET http://{TARGET}/metrics HTTP/1.1\r\nHost: {TARGET}\r\nConnection: close\r\n\
         X-Prometheus-Scrape-Timeout-Seconds: {TIMEOUT}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("the tunnel reads");
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        // An answer that breaks off ends with a reset.
        Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
    }
    let head = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
    assert!(head.starts_with("HTTP/1.1 ") || answer.is_empty(), "{head:?}");
    assert!(!answer.is_empty(), "no answer");
});

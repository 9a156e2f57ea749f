//! The stand-in for balena's VPN proxy answers as the real one did, byte for byte.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::support::sidecar::PATIENCE;
use crate::support::vpn::Vpn;

/// The key of the recordings.
const KEY: &str = "API-KEY";

fn recorded(name: &str, kind: &str) -> Vec<u8> {
    let path = format!("{}/tests/recordings/vpn/{name}.{kind}", env!("CARGO_MANIFEST_DIR"));
    fs::read(path).expect("a recording")
}

/// What listens on a device: reads a head, gives this answer and closes; without an answer it closes at once.
fn backend(answer: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = Vec::new();
            while !answer.is_empty() && !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).unwrap_or(0) == 0 {
                    break;
                }
                head.push(byte[0]);
            }
            thread::sleep(Duration::from_millis(if answer.is_empty() { 0 } else { 100 })); // as a device is slower than this
            let _ = stream.write_all(&answer);
        }
    });
    addr
}

/// The request as it was sent: the first head, and what follows it once that is answered.
fn exchange(vpn: &Vpn, request: &[u8], half_close: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(vpn.addr).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let end = request.windows(4).position(|end| end == b"\r\n\r\n").expect("a head") + 4;
    let (head, rest) = request.split_at(end);
    stream.write_all(head).unwrap();
    let mut answer = Vec::new();
    while !rest.is_empty() && !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    let _ = stream.write_all(rest);
    if half_close {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    let _ = stream.read_to_end(&mut answer); // a reset ends it too
    answer
}

#[test]
fn the_stand_in_answers_as_recorded() {
    let names = [
        "ok_connect10",
        "ok_connect11",
        "ok_long_uuid",
        "suffix_vpn",
        "noauth",
        "wrong_key",
        "api_down",
        "unknown_uuid",
        "upper_uuid",
        "lower_case_scheme",
        "basic_without_value",
        "offline",
        "port_closed",
        "port_22222",
        "bad_hostname",
        "suffix_other",
        "plain_get_absolute",
        "garbage",
        "half_close",
        "device_closes_at_accept",
    ];
    for name in names {
        let (request, expected) = (recorded(name, "req"), recorded(name, "res"));
        // the API that is down, and a wrong key, are told in one way
        let key = if matches!(name, "wrong_key" | "api_down") { "another" } else { KEY };
        let vpn = Vpn::start(key, None);
        let text = String::from_utf8_lossy(&request).into_owned();
        let target = text.split(' ').nth(1).unwrap_or_default();
        if let Some((host, port)) = target.split_once(':')
            && !matches!(name, "unknown_uuid" | "upper_uuid" | "plain_get_absolute")
        {
            let uuid = host.split('.').next().unwrap();
            vpn.device(uuid, |device| {
                device.offline = name == "offline";
                if !matches!(name, "port_closed" | "port_22222") {
                    let head = expected.windows(4).position(|end| end == b"\r\n\r\n").map_or(0, |end| end + 4);
                    // the answer that a half-close loses
                    let lost = if name == "half_close" { b"HTTP/1.1 200 OK\r\n\r\n" } else { &b""[..] };
                    device.ports.insert(port.parse().unwrap(), backend([&expected[head..], lost].concat()));
                }
            });
        }
        let answer = exchange(&vpn, &request, name == "half_close");
        assert_eq!(answer.escape_ascii().to_string(), expected.escape_ascii().to_string(), "{name}");
    }
}

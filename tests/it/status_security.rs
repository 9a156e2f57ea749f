//! Who may ask the status endpoint, and what a browser may do with its answers.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::cloud::Cloud;
use crate::support::fleet::demo_fleet;
use crate::support::sidecar::{PATIENCE, Sidecar, finish};
use crate::support::status::{Status, sidecar};
use base64::prelude::{BASE64_STANDARD, Engine};

const PATHS: [&str; 7] = ["/", "/metrics", "/targets", "/-/ready", "/-/healthy", "/style.css", "/nosuch"];
const TOKEN: &str = "correct-horse-battery-staple";

fn ask(status: &Status, path: &str, headers: &str) -> (u16, String, String) {
    let (code, head, body) = status.send(&format!("GET {path} HTTP/1.1\r\n{headers}\r\n"));
    (code, head, String::from_utf8_lossy(&body).into_owned())
}

fn start(cloud: &Cloud, settings: &[(&str, &str)]) -> (Status, Sidecar) {
    let sidecar = settings.iter().fold(sidecar(cloud), |sidecar, (name, value)| sidecar.env(name, *value));
    fs::write(sidecar.path("token"), format!("{TOKEN}\n")).expect("a file");
    let status = Status::start(&sidecar);
    let deadline = Instant::now() + PATIENCE;
    while ask(&status, "/-/ready", &format!("Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n")).0 != 200 {
        assert!(Instant::now() < deadline, "there is no list");
        thread::sleep(Duration::from_millis(20));
    }
    (status, sidecar)
}

#[test]
fn another_sites_name_reads_nothing() {
    let cloud = Cloud::start(demo_fleet());
    let (status, _sidecar) =
        start(&cloud, &[("STATUS_HOSTS", "status.example.org, Other.Example.NET, baletheus.monitoring_default")]);
    let port = status.address.port();
    for host in [
        "127.0.0.1",
        "192.168.0.7",
        "[::1]",
        "[fd12:3456::7]",
        "localhost",
        "LocalHost",
        "localhost.",
        "baletheus",
        "sidecar.localhost",
        "status.example.org",
        "STATUS.example.org.",
        "other.example.net",
        "baletheus.monitoring_default",
    ] {
        for host in [host.to_owned(), format!("{host}:{port}")] {
            assert_eq!(ask(&status, "/targets", &format!("Host: {host}\r\n")).0, 200, "{host}");
        }
    }
    for host in [
        "attacker.example",
        "raspberrypi.local",
        "status.example.org.attacker.example",
        "xstatus.example.org",
        "127.0.0.1.attacker.example",
        "127.0.0.1@attacker.example",
        "attacker.example@127.0.0.1",
        "localhost.attacker.example",
        "[::1].attacker.example",
        "attacker.example, localhost",
        "",
        "a b",
        "ä.example",
    ] {
        for path in PATHS {
            let (code, _, body) = ask(&status, path, &format!("Host: {host}\r\n"));
            assert!([400, 403].contains(&code) && !body.contains("fridge"), "{host} {path}: {code} {body}");
        }
    }
    let (code, _, body) = ask(&status, "/", "Host: attacker.example\r\n");
    assert!(code == 403 && body.contains("STATUS_HOSTS"), "{code} {body}");
    // Two names, or a name in the target, do not get around it.
    assert_eq!(ask(&status, "/targets", "Host: localhost\r\nHost: attacker.example\r\n").0, 403);
    assert_eq!(ask(&status, "http://attacker.example/targets", "Host: localhost\r\n").0, 403);
    assert_eq!(ask(&status, "http://localhost/targets", "Host: attacker.example\r\n").0, 403);
    // HTTP/1.0 has no Host, and no browser speaks it.
    assert_eq!(status.send("GET /-/healthy HTTP/1.0\r\n\r\n").0, 200);
}

#[test]
fn a_star_allows_every_name() {
    let cloud = Cloud::start(demo_fleet());
    let (status, _sidecar) = start(&cloud, &[("STATUS_HOSTS", "*")]);
    assert_eq!(ask(&status, "/targets", "Host: attacker.example\r\n").0, 200);
}

#[test]
fn every_answer_keeps_a_browser_from_using_it_for_anything_else() {
    let cloud = Cloud::start(demo_fleet());
    let (status, _sidecar) = start(&cloud, &[("STATUS_TOKEN_FILE", "token")]);
    let authorized = format!("Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n");
    let mut seen = Vec::new();
    for path in PATHS {
        for headers in [&*authorized, "Host: localhost\r\n", "Host: attacker.example\r\n"] {
            let (code, head, _) = ask(&status, path, headers);
            seen.push(code);
            for header in [
                "x-content-type-options: nosniff\r\n",
                "content-security-policy: default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; \
                 form-action 'none'; frame-ancestors 'none'\r\n",
                "referrer-policy: no-referrer\r\n",
                "cross-origin-resource-policy: same-origin\r\n",
            ] {
                assert!(head.contains(header), "{path} {code}: {header} is not in {head}");
            }
        }
    }
    for code in [200, 401, 403, 404] {
        assert!(seen.contains(&code), "{code} is not among {seen:?}");
    }
    let (code, head, _) = status.send(&format!("POST / HTTP/1.1\r\n{authorized}Content-Length: 0\r\n\r\n"));
    assert!(code == 405 && head.contains("nosniff"), "{head}");
}

#[test]
fn a_token_is_asked_for_if_one_is_set() {
    let cloud = Cloud::start(demo_fleet());
    let (status, sidecar) = start(&cloud, &[("STATUS_TOKEN_FILE", "token")]);
    let basic = |text: &str| format!("Basic {}", BASE64_STANDARD.encode(text));
    for good in [
        format!("Bearer {TOKEN}"),
        format!("bearer   {TOKEN}"),
        basic(&format!("anyone:{TOKEN}")),
        basic(&format!(":{TOKEN}")),
    ] {
        let (code, _, body) = ask(&status, "/targets", &format!("Host: localhost\r\nAuthorization: {good}\r\n"));
        assert!(code == 200 && body == sidecar.list(), "{good}: {code}");
    }
    for bad in [
        String::new(),
        "Authorization: Bearer \r\n".to_owned(),
        format!("Authorization: Bearer {}\r\n", &TOKEN[1..]),
        format!("Authorization: Bearer {TOKEN}x\r\n"),
        format!("Authorization: Digest {TOKEN}\r\n"),
        format!("Authorization: {TOKEN}\r\n"),
        format!("Authorization: {}\r\n", basic(TOKEN)),
        format!("Authorization: {}\r\n", basic(&format!("{TOKEN}:"))),
        "Authorization: Basic !!!\r\n".to_owned(),
    ] {
        for path in PATHS.iter().filter(|path| **path != "/-/healthy") {
            let (code, head, body) = ask(&status, path, &format!("Host: localhost\r\n{bad}"));
            assert!(code == 401 && body.contains("STATUS_TOKEN_FILE"), "{bad} {path}: {code} {body}");
            assert!(head.contains("www-authenticate: basic realm="), "{head}");
        }
    }
    // A container's health check has no token.
    assert_eq!(ask(&status, "/-/healthy", "Host: localhost\r\n").0, 200);
    let mut health = sidecar.command();
    health.args(["health", &format!("http://{}", status.address)]);
    assert!(finish(health).status.success());
    assert!(status.running.log().iter().all(|line| !line.contains(TOKEN)));
}

#[test]
fn a_token_that_is_replaced_in_its_file_is_followed() {
    let cloud = Cloud::start(demo_fleet());
    let (status, sidecar) = start(&cloud, &[("STATUS_TOKEN_FILE", "token")]);
    let code =
        |token: &str| ask(&status, "/targets", &format!("Host: localhost\r\nAuthorization: Bearer {token}\r\n")).0;
    let other = "another-token-of-this-length";
    fs::write(sidecar.path("token"), other).unwrap();
    assert_eq!([code(TOKEN), code(other)], [401, 200]);
    // The last token counts while the file has none.
    for nothing in ["", "short"] {
        fs::write(sidecar.path("token"), nothing).unwrap();
        assert_eq!([code(TOKEN), code(other), code(nothing)], [401, 200, 401]);
    }
    fs::remove_file(sidecar.path("token")).unwrap();
    assert_eq!([code(TOKEN), code(other)], [401, 200]);
    // The log says so, once.
    let warnings = |text: &str| status.running.log().iter().filter(|line| line.contains(text)).count();
    status.running.wait_for("the token file token is empty, so the old token stays");
    assert_eq!(warnings("so the old token stays"), 1);
    fs::write(sidecar.path("token"), TOKEN).unwrap();
    assert_eq!([code(TOKEN), code(other)], [200, 401]);
    fs::write(sidecar.path("token"), "short").unwrap();
    assert_eq!(code(TOKEN), 200);
    status.running.wait_for("the token file token has fewer than 16 characters, so the old token stays");
}

#[test]
fn a_bad_token_file_ends_the_start_and_shows_no_token() {
    let cloud = Cloud::start(demo_fleet());
    for (value, said) in [
        ("short", "has fewer than 16 characters"),
        ("empty", "is empty"),
        ("two-lines", "line break"),
        ("missing/token", "No such file"),
        (TOKEN, "STATUS_TOKEN_FILE is not shown"),
        ("q3/9ZkD+xT0bYw7uPqLm8R1s/Vc2", "STATUS_TOKEN_FILE is not shown"),
        ("https://me:0123456789@host", "STATUS_TOKEN_FILE is not shown"),
    ] {
        let sidecar = sidecar(&cloud).env("STATUS_TOKEN_FILE", value);
        for (name, text) in [("short", "15-characters-x"), ("empty", " \n"), ("two-lines", "0123456789\n0123456789")] {
            fs::write(sidecar.path(name), text).expect("a file");
        }
        let output = finish(sidecar.command());
        let log = String::from_utf8(output.stderr).expect("UTF-8");
        // A file that is missing may come.
        let code = if value == "missing/token" { 1 } else { 2 };
        assert!(output.status.code() == Some(code) && log.contains(said), "{value}: {log}");
        assert!(!log.contains(TOKEN) && !log.contains("15-characters") && !log.contains("0123456789"), "{log}");
    }
}

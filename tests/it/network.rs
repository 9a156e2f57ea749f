//! The network as it is: names with dead addresses, proxies of every kind, exporters that Prometheus takes, and devices
//! that move in the VPN.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::binary;
use crate::support::cloud::{Cloud, KEY, Reply};
use crate::support::fleet::demo_fleet;
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish};
use crate::support::tls::Authority;
use crate::support::vpn::{Device, Vpn};
use rustls::{ServerConnection, StreamOwned};
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nup 1\n";

fn target(number: usize) -> String {
    format!("{number:032x}.balena:9100")
}

fn write(sidecar: &Sidecar, targets: usize) {
    let groups: Vec<_> = (0..targets).map(|number| json!({"targets": [target(number)], "labels": {}})).collect();
    fs::write(sidecar.path("new.json"), json!(groups).to_string()).unwrap();
    fs::rename(sidecar.path("new.json"), sidecar.path("balena.json")).unwrap();
}

/// Answers each connection's requests with these bytes, until the function says that it closes.
fn exporter(answer: impl Fn(usize, &mut TcpStream) -> bool + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            thread::spawn(move || {
                while read_head(&mut stream).is_some_and(|head| !head.is_empty()) && answer(number, &mut stream) {}
            });
        }
    });
    addr
}

fn read_head(stream: &mut impl Read) -> Option<Vec<String>> {
    let lines = BufReader::with_capacity(1, stream).lines();
    lines.take_while(|line| line.as_ref().map_or(true, |line| !line.is_empty())).collect::<Result<_, _>>().ok()
}

/// A tunnel whose targets all have this exporter.
struct Setup {
    vpn: Vpn,
    url: String,
    running: Running,
    sidecar: Sidecar,
}

impl Setup {
    fn start(addr: SocketAddr, targets: usize) -> Self {
        let vpn = Vpn::start_with(KEY, move |_| Some(Device { ports: [(9100, addr)].into(), ..Device::default() }));
        let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
        write(&sidecar, targets);
        let (running, url) = sidecar.tunnel(&vpn.url());
        Setup { vpn, url, running, sidecar }
    }

    fn send(&self, request: &str) -> String {
        send(&self.url, request)
    }

    fn scrape(&self, number: usize) -> String {
        scrape(&self.url, &target(number), "")
    }

    /// The processor time of the tunnel so far, in steps of 10 ms. Unlike the clock, it does not run while others have the processor.
    fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.running.id())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let ticks = fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap());
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    fn metric(&self, line: &str) -> bool {
        self.send("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").lines().any(|other| other == line)
    }
}

fn send(url: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn scrape(url: &str, target: &str, headers: &str) -> String {
    let head = format!("GET http://{target}/metrics HTTP/1.1\r\nHost: {target}\r\n{headers}Connection: close\r\n\r\n");
    send(url, &head)
}

/// Addresses on one port of which only the last one answers: the backlogs of the others are full, so that they drop each
/// SYN. glibc puts addresses near this machine's own before others, so the one that answers is the farthest.
struct Swallowing {
    _full: Vec<(Socket, Vec<TcpStream>)>,
    hosts: String,
}

impl Swallowing {
    fn before(service: SocketAddr, addresses: u8) -> Self {
        let ip = |number: u8| Ipv4Addr::new(127, 0, 0, 1 + number);
        let full = (1..addresses).map(|number| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let addr = SocketAddr::from((ip(number), service.port()));
            socket.bind(&addr.into()).unwrap();
            socket.listen(0).unwrap();
            let timeout = Duration::from_millis(300);
            let waiting: Vec<_> = (0..4).map_while(|_| TcpStream::connect_timeout(&addr, timeout).ok()).collect();
            assert!(waiting.len() < 4, "its backlog is not full");
            (socket, waiting)
        });
        let full = full.collect();
        let last = Ipv4Addr::new(127, 128, 0, 1);
        let listener = TcpListener::bind((last, service.port())).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (client, server) = (stream.unwrap(), TcpStream::connect(service).unwrap());
                for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        to.shutdown(Shutdown::Write)
                    });
                }
            }
        });
        let names = (1..addresses).map(ip).chain([last]);
        let hosts = names.map(|ip| format!("{ip} several.test\n")).collect();
        Swallowing { _full: full, hosts }
    }

    /// A command that sees these addresses of `several.test`.
    fn wrap(&self, sidecar: &Sidecar, args: &[&str]) -> Command {
        fs::write(sidecar.path("hosts"), &self.hosts).unwrap();
        let inside = sidecar.command();
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(sidecar.path("hosts"));
        let set = inside.get_envs().filter_map(|(name, value)| Some((name, value?)));
        command.arg(inside.get_program()).args(inside.get_args()).args(args);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).envs(set).current_dir(sidecar.dir.path());
        command
    }
}

/// All at once, since each waits.
#[test]
fn each_address_of_a_name_has_its_share_of_the_time() {
    thread::scope(|scope| {
        for addresses in [2, 4] {
            scope.spawn(move || a_refresh_has_its_share(addresses));
            scope.spawn(move || a_scrape_has_its_share(addresses));
        }
    });
}

fn a_refresh_has_its_share(addresses: u8) {
    let cloud = Cloud::start(demo_fleet());
    let cloud_addr: SocketAddr = cloud.url().strip_prefix("http://").unwrap().parse().unwrap();
    let swallowing = Swallowing::before(cloud_addr, addresses);
    let sidecar = Sidecar::of(binary::path(), &cloud)
        .env("BALENA_API_URL", format!("http://several.test:{}", cloud_addr.port()))
        .env("API_TIMEOUT", "12s");
    let output = finish(swallowing.wrap(&sidecar, &["--oneshot"]));
    assert!(output.status.success(), "{addresses} addresses: {}", String::from_utf8_lossy(&output.stderr));
}

fn a_scrape_has_its_share(addresses: u8) {
    let addr = exporter(|_, stream| stream.write_all(OK.as_bytes()).is_ok());
    let vpn = Vpn::start_with(KEY, move |_| Some(Device { ports: [(9100, addr)].into(), ..Device::default() }));
    let swallowing = Swallowing::before(vpn.addr, addresses);
    let sidecar = Sidecar::new(binary::path())
        .env("API_KEY", KEY)
        .env("TUNNEL_URL", format!("http://several.test:{}", vpn.addr.port()))
        .env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
    write(&sidecar, 2);
    let running = Running::spawn(swallowing.wrap(&sidecar, &["tunnel"]));
    let line = running.wait_for("tunnel on http://");
    let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
    // a short time-out is shared as well
    for (number, header) in ["", "X-Prometheus-Scrape-Timeout-Seconds: 4\r\n"].into_iter().enumerate() {
        let answer = scrape(url, &target(number), header);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{addresses} addresses, {header:?}: {answer}");
    }
}

/// A proxy within TLS, whose answer is as sloppy as Go's client takes it.
fn sloppy_proxy(authority: Option<&Authority>, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let config = authority.map(|authority| authority.server(&["localhost"]));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, config) = (stream.unwrap(), config.clone());
            thread::spawn(move || match config {
                Some(config) => relay(StreamOwned::new(ServerConnection::new(config).unwrap(), stream), to),
                None => relay(stream, to),
            });
        }
    });
    addr
}

/// In turns, which is enough for HTTP without pipelining within plain text, and for TLS 1.3 with short records.
fn relay(mut client: impl Read + Write, to: SocketAddr) {
    let Some(head) = read_head(&mut client) else { return };
    assert!(head.iter().any(|line| line == "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ="), "{head:?}");
    let many: String = (0..60).map(|number| format!("X-{number}: 1\n")).collect();
    client.write_all(format!("HTTP/1.1 200 \n{many}X-Blank : 1\n\n").as_bytes()).unwrap();
    client.flush().unwrap();
    let mut server = TcpStream::connect(to).unwrap();
    let Some(head) = read_head(&mut client) else { return };
    server.write_all((head.join("\r\n") + "\r\n\r\n").as_bytes()).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut answer = Vec::new();
    let _ = server.read_to_end(&mut answer); // the answer, and no end of the connection
    let _ = client.write_all(&answer).and_then(|()| client.flush());
}

/// The tunnel host is reached by HTTP through the proxy, so that the test need not relay TLS within TLS.
#[test]
fn a_proxy_of_any_kind_leads_to_the_tunnel_host() {
    let addr = exporter(|_, stream| stream.write_all(OK.as_bytes()).is_ok());
    let authority = Authority::generate();
    for tls in [false, true] {
        let vpn = Vpn::start_with(KEY, move |_| Some(Device { ports: [(9100, addr)].into(), ..Device::default() }));
        let proxy = sloppy_proxy(tls.then_some(&authority), vpn.addr);
        let scheme = if tls { "https" } else { "http" };
        let sidecar = Sidecar::new(binary::path())
            .env("API_KEY", KEY)
            .env("BALENA_CA_FILE", "ca.pem")
            .env("HTTP_PROXY", format!("{scheme}://user:secret@localhost:{}", proxy.port()));
        fs::write(sidecar.path("ca.pem"), authority.pem()).unwrap();
        write(&sidecar, 1);
        let (running, url) = sidecar.tunnel("http://tunnel.test");
        // the proxy relays the handshake with the tunnel host and no more
        let answer = scrape(&url, &target(0), "X-Prometheus-Scrape-Timeout-Seconds: 2\r\n");
        assert_eq!(vpn.requests().len(), 1, "{scheme}: {answer} {:#?}", running.log());
        let asked = vpn.requests().concat();
        assert!(asked.starts_with(&format!("CONNECT {} HTTP/1.1\r\n", target(0))), "{asked}");
        assert!(!running.log().concat().contains("secret"), "{:?}", running.log());
    }
}

#[test]
fn a_proxy_that_fails_is_named_without_its_password() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sidecar = |cloud: &Cloud| {
        Sidecar::of(binary::path(), cloud)
            .env("TUNNEL_URL", "https://tunnel.test")
            .env("BALENA_API_URL", "https://api.test")
            .env("HTTPS_PROXY", format!("http://user:secret@{closed}"))
    };
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    write(&sidecar, 1);
    let (running, url) = sidecar.tunnel("https://tunnel.test");
    let named = format!("the proxy http://{closed} (HTTPS_PROXY)");
    let answer = scrape(&url, &target(0), "");
    let reason = format!("HTTP/1.1 502 tunnel host not reachable: {named} is not reachable: connection refused\r\n");
    assert!(answer.starts_with(&reason), "{answer}");
    let mut command = sidecar.command();
    command.arg("--oneshot");
    let log = String::from_utf8(finish(command).stderr).unwrap();
    assert!(log.contains(&format!("cannot reach https://api.test through {named}: ")), "{log}");
    let told = running.log().concat() + &answer + &log;
    assert!(!told.contains("secret") && !told.contains("user"), "{told}");
}

#[test]
fn the_status_of_a_proxy_that_refuses_the_api_is_named() {
    let cloud = Cloud::start(demo_fleet());
    for status in ["403 Forbidden", "502 Bad Gateway"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = listener.local_addr().unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = read_head(&mut stream);
                let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            }
        });
        let sidecar = Sidecar::of(binary::path(), &cloud)
            .env("BALENA_API_URL", "https://api.test")
            .env("HTTPS_PROXY", format!("http://user:secret@{proxy}"));
        let mut command = sidecar.command();
        command.arg("--oneshot");
        let log = String::from_utf8(finish(command).stderr).unwrap();
        let code = &status[..3];
        let why = format!("cannot reach https://api.test: the proxy http://{proxy} (HTTPS_PROXY) answers {code}; ");
        assert!(log.contains(&why) && !log.contains("secret"), "{log}");
    }
}

#[test]
fn a_proxy_that_cannot_be_used_is_a_warning_at_the_start() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = Sidecar::of(binary::path(), &cloud)
        .env("HTTPS_PROXY", "socks5://user:secret@proxy.test")
        .env("ALL_PROXY", "http://user:secret@")
        .env("NO_PROXY", "a/b, *, 127.0.0.1:80");
    let (running, _) = sidecar.tunnel(&cloud.url());
    let mut command = sidecar.command();
    command.args(["--oneshot"]);
    let log = String::from_utf8(finish(command).stderr).unwrap();
    for told in [log, running.log().join("\n")] {
        assert!(told.contains("WARN  HTTPS_PROXY is ignored: only http:// and https://"), "{told}");
        assert!(
            told.contains("WARN  ALL_PROXY is ignored: it is no URL of a proxy; it takes http://HOST:PORT"),
            "{told}"
        );
        assert!(told.contains("WARN  NO_PROXY has \"a/b\", which is no host, network or *"), "{told}");
        assert!(told.contains("WARN  NO_PROXY has \"127.0.0.1:80\""), "{told}");
        assert!(!told.contains("secret"), "{told}");
    }
}

/// The same entries for both clients.
#[test]
fn no_proxy_is_read_in_one_way() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cloud = Cloud::start(demo_fleet());
    let vpn = Vpn::start(KEY, None);
    for entry in ["*", " * ", "127.0.0.1", "x.test 127.0.0.1", "127.0.0.0/8", "x, localhost,127.0.0.1 "] {
        let sidecar =
            Sidecar::of(binary::path(), &cloud).env("HTTP_PROXY", format!("http://{closed}")).env("NO_PROXY", entry);
        sidecar.oneshot();
        write(&sidecar, 1);
        let (_running, url) = sidecar.tunnel(&vpn.url());
        assert!(scrape(&url, &target(0), "").starts_with("HTTP/1.1 502 refused: no access"), "{entry}");
    }
}

#[test]
fn check_says_that_prometheus_needs_to_be_told_of_the_proxy() {
    let cloud = Cloud::start(demo_fleet());
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (address, said) in [("public", true), ("lan", false)] {
        let sidecar = Sidecar::of(binary::path(), &cloud)
            .env("HTTPS_PROXY", format!("http://{closed}"))
            .env("FLEET", "no/such")
            .env("TARGET_ADDRESS", address);
        let mut command = sidecar.command();
        command.arg("check");
        let log = String::from_utf8(finish(command).stderr).unwrap();
        assert_eq!(log.contains("proxy_from_environment: true in the scrape config"), said, "{log}");
    }
}

#[test]
fn what_go_takes_of_an_exporter_passes() {
    let long = "x".repeat(20_000);
    let many: String = (0..1_000).map(|number| format!("X-{number}: {number}\r\n")).collect();
    for head in [
        format!("X-Long: {long}\r\n"),
        format!("X-Long: {long}\r\nX-Longer: {long}{long}\r\n"),
        many,
        "X-Blank : 1\r\n".to_owned(),
        "X-Folded: 1,\r\n 2\r\n".to_owned(),
        "Not a name: 1\r\n".to_owned(),
        "X-Lines: 1\nX-More: 2\n".to_owned(),
        "Content-Length: 5\r\n".to_owned(), // a second one
        "Connection: keep-alive, Content-Type\r\n".to_owned(),
    ] {
        let answer = OK.replacen("Content-Type", &format!("{head}Content-Type"), 1);
        let setup = Setup::start(exporter(move |_, stream| stream.write_all(answer.as_bytes()).is_ok()), 1);
        for _ in 0..2 {
            let answer = setup.scrape(0);
            assert!(
                answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nup 1\n"),
                "{head:.60}: {answer:.300}"
            );
            assert!(answer.contains("\r\ncontent-type: text/plain\r\n"), "{head:.60}: {answer:.300}");
        }
        assert_eq!(setup.vpn.requests().len(), 1, "the tunnel is kept: {head:.60}");
    }
    let answer = OK.replacen("Content-Type", &format!("X-Long: {}\r\nContent-Type", "x".repeat(200_000)), 1);
    let setup = Setup::start(exporter(move |_, stream| stream.write_all(answer.as_bytes()).is_ok()), 1);
    let answer = setup.scrape(0);
    assert!(answer.starts_with("HTTP/1.1 502 the head of the answer is larger than 64 KiB\r\n"), "{answer:.300}");
}

/// Prometheus logs a `Content-Type` that it does not know at each scrape, whole.
#[test]
fn a_long_content_type_is_refused() {
    for (length, expected) in [
        (256, "HTTP/1.1 200 OK\r\n"),
        (257, "HTTP/1.1 502 the Content-Type of the answer is longer than 256 bytes\r\n"),
    ] {
        let answer = OK.replacen("text/plain", &"x".repeat(length), 1);
        let setup = Setup::start(exporter(move |_, stream| stream.write_all(answer.as_bytes()).is_ok()), 1);
        let answer = setup.scrape(0);
        assert!(answer.starts_with(expected), "{answer:.300}");
        assert_eq!(setup.metric("baletheus_tunnel_scrapes_total{result=\"too_large\"} 1"), length == 257);
    }
}

#[test]
fn what_prometheus_sends_passes_or_has_a_reason() {
    let setup = Setup::start(exporter(|_, stream| stream.write_all(OK.as_bytes()).is_ok()), 1);
    let many: String = (0..500).map(|number| format!("X-{number}: {number}\r\n")).collect();
    for headers in [many, format!("X-Long: {}\r\n", "x".repeat(40_000))] {
        let answer = scrape(&setup.url, &target(0), &headers);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:.300}");
    }
    let answer = scrape(&setup.url, &target(0), &format!("X-Long: {}\r\n", "x".repeat(300_000)));
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{answer}");
    setup.running.wait_for("WARN  refused a request: message head is too large: the bound is 64 KiB and 1024 headers; are there too many http_headers");
    assert!(setup.metric("baletheus_tunnel_scrapes_total{result=\"bad_request\"} 1"));
    // An https:// in front of the proxy's address: Prometheus begins with TLS.
    let setup = Setup::start(exporter(|_, stream| stream.write_all(OK.as_bytes()).is_ok()), 1);
    let mut stream = TcpStream::connect(setup.url.trim_start_matches("http://")).unwrap();
    stream.write_all(b"\x16\x03\x01\x00\xc4\x01\x00\r\n\r\n").unwrap();
    setup.running.wait_for("does proxy_url in the scrape config begin with http://?");
}

/// An exporter that closes can do so in three ways, which the operating system reports differently.
#[test]
fn a_port_that_accepts_and_closes_has_one_reason() {
    let expected = "HTTP/1.1 502 broke off: the connection closes before the answer is complete\r\n";
    let before_the_request = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        thread::spawn(move || listener.incoming().for_each(drop));
        addr
    };
    let with_a_reset = exporter(|_, stream| {
        SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
        false
    });
    for addr in [before_the_request, with_a_reset, exporter(|_, _| false)] {
        let setup = Setup::start(addr, 1);
        for _ in 0..10 {
            let answer = setup.scrape(0);
            assert!(answer.starts_with(expected), "{answer}");
        }
    }
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n";
    let setup = Setup::start(exporter(move |_, stream| stream.write_all(half.as_bytes()).is_err()), 1);
    let answer = setup.scrape(0);
    assert!(answer.starts_with(expected), "a body that breaks at its first byte: {answer}");
}

#[test]
fn an_answer_that_can_be_read_in_two_ways_is_refused() {
    for (answer, why) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nup 1\n", "invalid content-length parsed"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nup 1\n", "Content-Length is not a number"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk\r\n", "Invalid chunk size line"),
    ] {
        let setup = Setup::start(exporter(move |_, stream| stream.write_all(answer.as_bytes()).is_ok()), 1);
        let said = setup.scrape(0);
        assert!(said.starts_with(&format!("HTTP/1.1 502 not HTTP: {why}")), "{answer:?}: {said}");
    }
}

/// They come as fast as they can be read. hyper reads on as long as there are more, and the tunnel has one thread.
#[test]
fn informational_answers_without_an_end_take_no_turn_of_other_scrapes() {
    const SCRAPES: usize = 100;
    let flood = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".repeat(25_000);
    let setup = Setup::start(
        exporter(move |_, stream| {
            while stream.write_all(&flood).is_ok() {}
            false
        }),
        1,
    );
    for _ in 0..SCRAPES {
        let before = setup.processor_time();
        let said = setup.scrape(0);
        assert!(said.starts_with("HTTP/1.1 502 not HTTP: more than 5 informational answers\r\n"), "{said}");
        let took = setup.processor_time() - before;
        assert!(took < Duration::from_millis(500), "{took:?} of processor time for one scrape");
    }
}

/// As after a device lost its VPN connection in silence: its kept tunnels swallow what is sent. One scrape fails, and closes the
/// tunnels to all exporters of the device.
#[test]
fn a_kept_tunnel_that_died_in_silence_costs_one_scrape_of_its_device() {
    let is_dead = Arc::new(AtomicBool::new(false));
    let dies = is_dead.clone();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let addr = exporter(move |connection, stream| {
        count.fetch_add(1, Ordering::Relaxed);
        (connection < 2 && dies.load(Ordering::Relaxed)) || stream.write_all(OK.as_bytes()).is_ok()
    });
    let ports = [(9100, addr), (9101, addr)];
    let vpn = Vpn::start_with(KEY, move |_| Some(Device { ports: ports.into(), ..Device::default() }));
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    let other = target(0).replace("9100", "9101");
    fs::write(sidecar.path("balena.json"), json!([{"targets": [target(0), other]}]).to_string()).unwrap();
    let (running, url) = sidecar.tunnel(&vpn.url());
    let setup = Setup { vpn, url, running, sidecar };
    let get = |target: &str, timeout: &str| {
        scrape(&setup.url, target, &format!("X-Prometheus-Scrape-Timeout-Seconds: {timeout}\r\n"))
    };
    let is_ok = |answer: String| assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    for target in [&target(0), &other] {
        is_ok(get(target, "60"));
    }
    is_dead.store(true, Ordering::Relaxed);
    let answer = get(&target(0), "1");
    assert!(answer.starts_with("HTTP/1.1 504 no answer in 0.9 s\r\n"), "{answer}");
    for target in [&other, &target(0)] {
        is_ok(get(target, "60"));
    }
    assert_eq!(requests.load(Ordering::Relaxed), 5, "one for each scrape");
    assert_eq!(setup.vpn.requests().len(), 4);
}

/// An exporter that takes one scrape at a time answers 503 to a second request. This one takes a third of the time-out and more, which
/// once brought it one.
#[test]
fn a_slow_exporter_gets_one_request_for_each_scrape() {
    let (busy, requests) = (AtomicBool::new(false), Arc::new(AtomicUsize::new(0)));
    let count = requests.clone();
    let addr = exporter(move |_, stream| {
        let slow = count.fetch_add(1, Ordering::Relaxed) == 1;
        if busy.swap(true, Ordering::Relaxed) {
            return stream.write_all(OK.replacen("200 OK", "503 Busy", 1).as_bytes()).is_ok();
        }
        if slow {
            thread::sleep(Duration::from_secs(7)); // the work of the scrape
        }
        busy.store(false, Ordering::Relaxed);
        stream.write_all(OK.as_bytes()).is_ok()
    });
    let setup = Setup::start(addr, 1);
    for _ in 0..3 {
        let answer = scrape(&setup.url, &target(0), "X-Prometheus-Scrape-Timeout-Seconds: 20\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
    assert_eq!((requests.load(Ordering::Relaxed), setup.vpn.requests().len()), (3, 1));
}

/// A kept connection that ends before the answer is closed by an exporter that idles: the request is repeated. One that ends within
/// the answer has had the request.
#[test]
fn a_request_is_repeated_as_go_repeats_it() {
    for (begins, expected) in [("", 2), ("HTTP/1.1 200", 1), ("HTTP/1.1 103 Early Hints\r\n\r\n", 1), ("{}", 1)] {
        let requests = Arc::new(AtomicUsize::new(0));
        let count = requests.clone();
        let addr = exporter(move |_, stream| match count.fetch_add(1, Ordering::Relaxed) {
            1 => stream.write_all(begins.as_bytes()).is_err(),
            _ => stream.write_all(OK.as_bytes()).is_ok(),
        });
        let setup = Setup::start(addr, 1);
        assert!(setup.scrape(0).starts_with("HTTP/1.1 200 OK\r\n"));
        let answer = setup.scrape(0);
        assert_eq!(answer.starts_with("HTTP/1.1 200 OK\r\n"), expected == 2, "{begins:?}: {answer}");
        assert_eq!(requests.load(Ordering::Relaxed), 1 + expected, "{begins:?}");
    }
}

#[test]
fn what_hits_all_targets_is_logged_once_and_when_it_is_over() {
    let addr = exporter(|_, stream| stream.write_all(OK.as_bytes()).is_ok());
    let vpn = Vpn::start("the-right-key", None);
    let sidecar = Sidecar::new(binary::path()).env("API_KEY_FILE", "key");
    fs::write(sidecar.path("key"), "a-wrong-key").unwrap();
    write(&sidecar, 3);
    let (running, url) = sidecar.tunnel(&vpn.url());
    let setup = Setup { vpn, url, running, sidecar };
    for number in [0, 1, 2, 0, 1, 2] {
        assert!(setup.scrape(number).starts_with("HTTP/1.1 502 refused: no access"));
    }
    let warning = "WARN  every scrape fails: refused: no access, unknown device, or balena's API busy; is the API key";
    setup.running.wait_for(warning);
    fs::write(setup.sidecar.path("key"), "the-right-key").unwrap();
    let device = |ports: &[(u16, SocketAddr)]| {
        for number in 0..3 {
            let name = target(number).split('.').next().unwrap().to_owned();
            setup.vpn.device(&name, |device| device.ports = ports.iter().copied().collect());
        }
    };
    device(&[(9100, addr)]);
    assert!(setup.scrape(0).starts_with("HTTP/1.1 200 OK\r\n"));
    setup.running.wait_for("INFO  scrapes succeed again (before: no_access)");
    // another reason; one device alone is none
    device(&[]);
    for number in [1, 1] {
        assert!(setup.scrape(number).starts_with("HTTP/1.1 502 port 9100 closed"));
    }
    assert_eq!(count(&setup.running, "every scrape fails"), 1);
    for number in [2, 1, 2] {
        assert!(setup.scrape(number).starts_with("HTTP/1.1 502 port 9100 closed"));
    }
    assert_eq!(count(&setup.running, "every scrape fails"), 1, "the tunnel of target 0 is kept, and it works");
    assert!(setup.scrape(0).starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(count(&setup.running, warning), 1);
}

fn count(running: &Running, text: &str) -> usize {
    running.log().iter().filter(|line| line.contains(text)).count()
}

/// A redirect of a device leads `check` neither to its other ports nor to other devices.
#[test]
fn check_does_not_follow_a_redirect_away_from_the_target() {
    let backend = Cloud::start(Vec::new());
    backend.intercept(|seen, _| {
        Some(match &*seen.target {
            "/metrics" => Reply::status(302, &[("Location", "http://127.0.0.1:1/metrics")], b""),
            _ => Reply::status(404, &[], b""),
        })
    });
    let vpn = Vpn::start_with(KEY, {
        let addr = backend.addr();
        move |_| Some(Device { ports: [(80, addr)].into(), ..Device::default() })
    });
    let cloud = Cloud::start(demo_fleet());
    let sidecar = Sidecar::of(binary::path(), &cloud).env("TUNNEL_URL", vpn.url());
    let mut command = sidecar.command();
    command.arg("check");
    let table = String::from_utf8(finish(command).stdout).unwrap();
    assert!(
        table.contains("redirects to 127.0.0.1:1, away from the target: a scrape does not follow (302)"),
        "{table}"
    );
}

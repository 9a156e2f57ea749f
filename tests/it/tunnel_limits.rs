//! What the tunnel takes on: connections, memory, threads and files at their limits, and a file system that hangs.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::binary;
use crate::support::cloud::KEY;
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish};
use crate::support::tools::installed;
use crate::support::vpn::{Device, Vpn};
use serde_json::json;

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nup 1\n";

/// `mem_limit` of the tunnel in `docker-compose.yml`, in bytes.
const STACK_MEMORY: usize = 64 << 20;

fn target(number: usize) -> String {
    format!("{number:032x}.balena:9100")
}

fn targets(number: usize) -> String {
    let groups: Vec<_> = (0..number).map(|number| json!({"targets": [target(number)], "labels": {}})).collect();
    json!(groups).to_string()
}

/// Answers each request with a small page.
fn exporter() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                loop {
                    let lines = BufReader::with_capacity(1, &mut stream).lines().map_while(Result::ok);
                    if lines.take_while(|line| !line.is_empty()).count() == 0
                        || stream.write_all(OK.as_bytes()).is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    addr
}

fn vpn(addr: SocketAddr) -> Vpn {
    Vpn::start_with(KEY, move |_| Some(Device { ports: [(9100, addr)].into(), ..Device::default() }))
}

fn sidecar(number: usize) -> Sidecar {
    let sidecar = Sidecar::new(binary::path()).env("API_KEY", KEY);
    fs::write(sidecar.path("balena.json"), targets(number)).unwrap();
    sidecar
}

fn connect(url: &str) -> TcpStream {
    let stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn get(url: &str, what: &str) -> String {
    let mut stream = connect(url);
    stream.write_all(format!("GET {what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Its own pages are answered, however much else there is.
fn is_healthy(url: &str) {
    for path in ["/-/healthy", "/metrics"] {
        let answer = get(url, path);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {answer}");
    }
}

fn scrape(url: &str, number: usize) -> String {
    get(url, &format!("http://{}/metrics", target(number)))
}

/// The URL in the first line of its log.
fn url(running: &Running) -> String {
    let line = running.wait_for("tunnel on http://");
    line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned()
}

/// Connections that say nothing, that say half of a request, and that wait after an answer.
#[test]
fn idle_connections_leave_room_for_health_and_scrapes() {
    let vpn = vpn(exporter());
    let sidecar = sidecar(3);
    let (_running, url) = sidecar.tunnel_within(128, &vpn.url());
    for said in ["", "GET http://x", "GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let idle: Vec<_> = (0..345)
            .map(|_| {
                let mut stream = connect(&url);
                let _ = stream.write_all(said.as_bytes()); // it may have been closed to make room
                stream
            })
            .collect();
        is_healthy(&url);
        for number in 0..3 {
            assert!(scrape(&url, number).starts_with("HTTP/1.1 200 OK\r\n"), "{said:?}");
        }
        drop(idle);
    }
}

/// A connection that is being answered is not closed to make room.
#[test]
fn a_scrape_in_progress_is_not_closed_for_an_idle_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let slow = listener.local_addr().unwrap();
    let (answer, may_answer) = mpsc::channel::<()>();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        may_answer.recv().unwrap();
        stream.write_all(OK.as_bytes()).unwrap();
    });
    let vpn = vpn(slow);
    let sidecar = sidecar(1);
    let (_running, url) = sidecar.tunnel_within(128, &vpn.url());
    let scraping = thread::spawn({
        let url = url.clone();
        move || scrape(&url, 0)
    });
    while vpn.requests().is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    let idle: Vec<_> = (0..200).map(|_| connect(&url)).collect();
    is_healthy(&url);
    answer.send(()).unwrap();
    let answer = scraping.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    drop(idle);
}

/// The tunnel in a namespace where `script` has mounted something, with `$1`.
fn start_in_namespace(sidecar: &Sidecar, vpn: &Vpn, script: &str, arg: &str) -> Running {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &format!("{script} && shift && exec \"$@\"")]);
    let inside = sidecar.command();
    command.args(["sh", arg]).arg(inside.get_program()).arg("tunnel");
    let set = inside.get_envs().filter_map(|(name, value)| Some((name, value?)));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).envs(set).current_dir(sidecar.dir.path());
    command.env("TUNNEL_URL", vpn.url()).env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
    Running::spawn(command)
}

/// The tunnel with the memory limit that the stack gives it.
fn start_in_the_stack(sidecar: &Sidecar, vpn: &Vpn) -> (Running, String) {
    fs::create_dir_all(sidecar.path("cgroup/memory")).unwrap();
    let limit = format!("{STACK_MEMORY}\n");
    fs::write(sidecar.path("cgroup/memory.max"), &limit).unwrap();
    fs::write(sidecar.path("cgroup/memory/memory.limit_in_bytes"), &limit).unwrap();
    let cgroup = sidecar.path("cgroup");
    let running = start_in_namespace(sidecar, vpn, "mount --bind \"$1\" /sys/fs/cgroup", cgroup.to_str().unwrap());
    let url = url(&running);
    (running, url)
}

fn stays_within_the_limit(running: &Running) {
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let most: usize = most.trim().trim_end_matches(" kB").parse().unwrap();
    println!("{most} kB");
    assert!(most << 10 < STACK_MEMORY, "{most} kB of memory");
}

/// Holds a file system that hangs, and lets it go when dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network file system whose server is gone: here FUSE without anyone who answers.
#[test]
fn a_target_file_that_hangs_stops_nothing() {
    let vpn = vpn(exporter());
    let sidecar = sidecar(2).env("SD_FILE_PATH", "targets/balena.json");
    fs::create_dir(sidecar.path("targets")).unwrap();
    fs::rename(sidecar.path("balena.json"), sidecar.path("targets/balena.json")).unwrap();
    let running = start_in_namespace(&sidecar, &vpn, "true", "");
    let url = url(&running);
    assert!(scrape(&url, 0).starts_with("HTTP/1.1 200 OK\r\n"), "{:?}", running.log());
    let mount = "exec 3<>/dev/fuse && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none \"$1\" \
        && echo mounted && exec sleep 600";
    let mut hang = Holder(
        Command::new("nsenter")
            .args(["--target", &running.id().to_string(), "--user", "--mount", "--preserve-credentials"])
            .args(["sh", "-c", mount, "sh"])
            .arg(sidecar.path("targets"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("`nsenter`: install the package util-linux"),
    );
    let mut line = String::new();
    BufReader::new(hang.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "mounted\n", "this test needs /dev/fuse");
    // The wait for the file is a part of the scrape's time. The last check of the file holds for a second.
    thread::sleep(Duration::from_secs(1));
    let head = format!("GET http://{}/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n", target(0));
    let mut stream = connect(&url);
    stream.write_all(format!("{head}X-Prometheus-Scrape-Timeout-Seconds: 0.5\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 504 no answer in 0.45 s\r\n"), "{answer}");
    // One scrape waits for the file for a second, and after that none: some have an answer in less. Not each of them, since the machine
    // may be slow.
    let hasty = || {
        let mut stream = connect(&url);
        stream.write_all(format!("{head}X-Prometheus-Scrape-Timeout-Seconds: 0.9\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.starts_with("HTTP/1.1 200 OK\r\n")
    };
    assert!((0..40).any(|_| hasty()), "{:?}", running.log());
    for number in [0, 1, 0, 1] {
        assert!(scrape(&url, number).starts_with("HTTP/1.1 200 OK\r\n"), "{:?}", running.log());
        is_healthy(&url);
    }
}

/// A network file system that takes most of a second for each look at the target file. `strace` makes it slow, and counts the looks.
#[test]
fn scrapes_share_a_look_at_a_slow_target_file() {
    const SCRAPES: usize = 100;
    installed("strace", "strace");
    let vpn = vpn(exporter());
    let sidecar = sidecar(SCRAPES);
    let inside = sidecar.command();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "|cat > looks", "-e", "trace=statx", "-e", "inject=statx:delay_enter=800000"]);
    command.arg("-P").arg(sidecar.path("balena.json")); // the calls for this path only
    command.args(["setpriv", "--pdeathsig", "KILL"]).arg(inside.get_program()).arg("tunnel");
    command.current_dir(sidecar.dir.path()).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.env("API_KEY", KEY).env("TUNNEL_URL", vpn.url()).env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
    command.env("SD_FILE_PATH", sidecar.path("balena.json"));
    let running = Running::spawn(command);
    let url = url(&running);
    // Reading the file takes several of these calls, and longer than a scrape waits for it.
    let deadline = Instant::now() + PATIENCE;
    while !scrape(&url, 0).starts_with("HTTP/1.1 200 OK\r\n") {
        assert!(Instant::now() < deadline, "{:?}", running.log());
    }
    let looks = || fs::read_to_string(sidecar.path("looks")).unwrap().lines().count();
    let before = looks();
    let mut streams: Vec<_> = (0..SCRAPES).map(|_| connect(&url)).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        let head = format!("GET http://{}/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", target(number));
        stream.write_all(head.as_bytes()).unwrap();
    }
    for mut stream in streams {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
    let looks = looks() - before;
    assert!(before > 0 && looks < SCRAPES / 2, "{looks} looks for {SCRAPES} scrapes");
}

/// As where a user or a pids cgroup has no room for a moment.
#[test]
fn a_thread_that_cannot_be_started_fails_one_scrape() {
    let vpn = vpn(exporter());
    let sidecar = sidecar(2);
    fs::set_permissions(sidecar.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // root has no limit
    let nobody = || {
        let mut command = Command::new("setpriv");
        if rustix::process::getuid().is_root() {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        command
    };
    let (inside, mut command) = (sidecar.command(), nobody());
    command.arg(inside.get_program()).arg("tunnel").current_dir(sidecar.dir.path()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap()).env("API_KEY", KEY);
    // a name, which has to be looked up
    command.env("TUNNEL_URL", format!("http://localhost:{}", vpn.addr.port()));
    let running = Running::spawn({
        command.env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
        command
    });
    let url = url(&running);
    let limit = |limit: &str| {
        let args = ["prlimit", "--pid", &running.id().to_string(), &format!("--nproc={limit}")];
        let status = nobody().args(args).status().expect("`setpriv`: install the package util-linux");
        assert!(status.success());
    };
    limit("1:");
    let answer = scrape(&url, 0);
    let reason = "HTTP/1.1 502 tunnel host not reachable: cannot start a thread: Resource temporarily unavailable";
    assert!(answer.starts_with(reason), "{answer} {:?}", running.log());
    is_healthy(&url);
    limit("4096:");
    assert!(scrape(&url, 0).starts_with("HTTP/1.1 200 OK\r\n"), "{:?}", running.log());
}

/// Docker before 20.10.10 answers the system call clone3 with EPERM, where glibc falls back only after ENOSYS.
#[test]
fn a_refused_thread_is_named_at_the_start() {
    const LAUNCHER: &str = "#include <errno.h>
        #include <stddef.h>
        #include <linux/filter.h>
        #include <linux/seccomp.h>
        #include <sys/prctl.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int main(int argc, char **argv) {
            struct sock_filter code[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
            };
            struct sock_fprog program = {sizeof code / sizeof *code, code};
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 99;
            return execv(argv[1], argv + 1);
        }";
    let sidecar = sidecar(1).env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
    fs::write(sidecar.path("launcher.c"), LAUNCHER).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-o", "launcher", "launcher.c"]).current_dir(sidecar.dir.path());
    assert!(compile.status().expect("`cc`, which Rust links with").success());
    for args in [&["tunnel"][..], &["--oneshot"], &["check"]] {
        let mut command = Command::new(sidecar.path("launcher"));
        command.arg(binary::path()).args(args).env_clear().env("API_KEY", KEY).current_dir(sidecar.dir.path());
        let output = finish({
            command.env("TUNNEL_LISTEN_ADDRESS", "127.0.0.1:0");
            command
        });
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {log}");
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains("cannot start: ") && last.contains("cannot start a thread: "), "{args:?}: {log}");
        assert!(last.contains("update the container engine") && !last.contains("TLS"), "{args:?}: {log}");
    }
}

/// The limits of a container with 64 MB, with 2,000 scrapes of large answers that nobody reads.
#[test]
fn slow_large_answers_stay_within_the_memory_limit() {
    const SCRAPES: usize = 2_000;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let lines = BufReader::with_capacity(1, &mut stream).lines().map_while(Result::ok);
                lines.take_while(|line| !line.is_empty()).count();
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n");
                while stream.write_all(&[b'x'; 1 << 16]).is_ok() {} // until the tunnel closes it
            });
        }
    });
    let vpn = vpn(addr);
    let sidecar = sidecar(SCRAPES);
    let (running, url) = start_in_the_stack(&sidecar, &vpn);
    let mut streams = Vec::new();
    for number in 0..SCRAPES {
        let mut stream = connect(&url);
        let head = format!("GET http://{}/ HTTP/1.1\r\nHost: x\r\n\r\n", target(number));
        let _ = stream.write_all(head.as_bytes());
        streams.push(stream);
        if number % 500 == 0 {
            is_healthy(&url);
        }
    }
    is_healthy(&url);
    stays_within_the_limit(&running);
    assert!(get(&url, "/metrics").contains("{result=\"busy\"}"), "some are told that there is no place");
    drop(streams);
}

/// A connection of Prometheus to an https target. The tunnel does not read what passes, so it need not be TLS.
struct Https(TcpStream);

impl Https {
    fn connect(url: &str, number: usize) -> Self {
        let mut stream = connect(url);
        stream.write_all(format!("CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n", target(number)).as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", head.escape_ascii());
        Https(stream)
    }

    /// False if the tunnel has closed it.
    fn scrape(&mut self) -> bool {
        let mut answer = vec![0; OK.len()];
        self.0.write_all(b"GET / HTTP/1.1\r\n\r\n").is_ok() && self.0.read_exact(&mut answer).is_ok()
    }

    /// What a client with HTTP/2 sends after an answer, and what nobody answers. The exporter waits for the end of a head.
    fn say_more(&mut self) {
        self.0.write_all(b"WINDOW_UPDATE").unwrap();
    }
}

fn https_targets(numbers: impl Iterator<Item = usize>, timeout: &str) -> Vec<serde_json::Value> {
    let labels = json!({"__scheme__": "https", "__scrape_timeout__": timeout});
    numbers.map(|number| json!({"targets": [target(number)], "labels": labels})).collect()
}

/// There are 109 places for scrapes. Prometheus keeps its connections to https targets.
#[test]
fn https_targets_that_idle_take_no_place_of_a_scrape() {
    const HTTPS: usize = 300;
    let vpn = vpn(exporter());
    let sidecar = sidecar(0);
    let mut groups = https_targets(0..HTTPS, "10s");
    groups.extend((HTTPS..2 * HTTPS).map(|number| json!({"targets": [target(number)]})));
    fs::write(sidecar.path("balena.json"), json!(groups).to_string()).unwrap();
    let (running, url) = start_in_the_stack(&sidecar, &vpn);
    let mut kept = Vec::new();
    for number in 0..HTTPS {
        let mut https = Https::connect(&url, number);
        assert!(https.scrape());
        if number % 5 == 0 {
            https.say_more(); // it works on for the time-out of the scrape
        }
        kept.push(https);
    }
    for number in HTTPS..2 * HTTPS {
        let answer = scrape(&url, number);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{number}: {answer}");
    }
    // and once more through what is kept
    for https in &mut kept {
        assert!(https.scrape());
    }
    assert_eq!(vpn.requests().len(), 2 * HTTPS);
    let metrics = get(&url, "/metrics");
    assert!(metrics.contains("\nbaletheus_tunnel_scrapes_total{result=\"busy\"} 0\n"), "{metrics}");
    stays_within_the_limit(&running);
}

/// The tunnels at once are a third of the files that the process may open, less 64, and so are the scrapes.
#[test]
fn https_targets_that_idle_give_way_the_longest_idle_first() {
    const PLACES: usize = 32;
    let vpn = vpn(exporter());
    let sidecar = sidecar(0);
    let mut groups = https_targets(0..PLACES, "1h");
    groups.extend(https_targets(PLACES..PLACES + 1, "1s"));
    let http = PLACES + 1;
    groups.push(json!({"targets": [target(http)]}));
    fs::write(sidecar.path("balena.json"), json!(groups).to_string()).unwrap();
    let (running, url) = sidecar.tunnel_within(64 + 3 * PLACES, &vpn.url());
    // A relay works from the start until its device has answered.
    let mut kept: Vec<_> = (0..PLACES).map(|number| Https::connect(&url, number)).collect();
    for _ in 0..2 {
        let answer = scrape(&url, http);
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    running.wait_for("WARN  too many scrapes at once");
    assert_eq!(running.log().iter().filter(|line| line.contains("too many scrapes at once")).count(), 1);
    // Two idle: the second one first.
    assert!(kept[1].scrape() && kept[0].scrape());
    let answer = scrape(&url, http);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(!kept[1].scrape(), "the longest idle");
    assert!(kept[0].scrape() && kept[PLACES - 1].scrape(), "the other ones");

    // Without an answer, a relay idles after the time-out of the scrape. Here it has the only place.
    let (running, url) = sidecar.tunnel_within(64 + 3, &vpn.url());
    let mut https = Https::connect(&url, PLACES);
    assert!(https.scrape());
    https.say_more();
    let deadline = Instant::now() + PATIENCE;
    while !scrape(&url, http).starts_with("HTTP/1.1 200 OK\r\n") {
        assert!(Instant::now() < deadline, "{:?}", running.log());
    }
    assert!(!https.scrape());
}

/// The bound follows from the memory limit: half a gigabyte would not fit.
#[test]
fn a_target_file_that_does_not_fit_into_the_memory_is_not_read() {
    let vpn = vpn(exporter());
    let sidecar = sidecar(1);
    let (running, url) = start_in_the_stack(&sidecar, &vpn);
    assert!(scrape(&url, 0).starts_with("HTTP/1.1 200 OK\r\n"));
    let sparse = fs::File::create(sidecar.path("large")).unwrap();
    sparse.set_len(500 << 20).unwrap();
    fs::rename(sidecar.path("large"), sidecar.path("balena.json")).unwrap();
    thread::sleep(Duration::from_secs(1)); // for so long the last look holds
    assert!(scrape(&url, 0).starts_with("HTTP/1.1 200 OK\r\n"));
    let line = running.wait_for("balena.json is too large: the bound is 8 MiB");
    assert!(line.contains("The list that was read before stays, with "), "{line}");
    stays_within_the_limit(&running);
}

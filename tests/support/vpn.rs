//! A stand-in for balena's VPN proxy, which answers as the recordings in `tests/recordings/vpn` do.
//! `tests/it/vpn_recordings.rs` holds it against them.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use baletheus::net::Stream;
use base64::prelude::{BASE64_STANDARD, Engine};
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const ESTABLISHED: &str = "HTTP/1.0 200 Connection Established\r\nProxy-agent: balena-io/node-tunnel (v4.0.8)\r\n\r\n";
const NO_ACCESS: &str = "HTTP/1.0 407 Proxy Authorization Required\r\n\r\n";
const NOT_CONNECTED: &str = "HTTP/1.0 503 Service Unavailable\r\n\r\n";
const NO_PORT: &str = "HTTP/1.0 500 Internal Server Error\r\n\r\n";
const NO_DEVICE: &str = "HTTP/1.0 403 Forbidden\r\n\r\n";
const NO_CONNECT: &str = "HTTP/1.1 405 Method Not Allowed\r\nContent-Type: text/plain\r\n\
    Date: Sun, 22 Nov 2026 07:15:59 GMT\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
    12\r\nMethod not allowed\r\n0\r\n\r\n";
const NO_HTTP: &str = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";

/// Any other device, by its uuid.
type Others = dyn Fn(&str) -> Option<Device> + Send + Sync;

/// A device, as the VPN sees it.
#[derive(Clone, Default)]
pub struct Device {
    pub offline: bool,
    /// It swallows packets.
    pub silent: bool,
    /// What listens on its ports.
    pub ports: HashMap<u16, SocketAddr>,
}

struct Shared {
    /// None: a proxy of somebody else's, which knows any name and asks for no key.
    key: Option<String>,
    devices: Mutex<HashMap<String, Device>>,
    others: Box<Others>,
    requests: Mutex<Vec<String>>,
}

/// It runs until the test ends.
pub struct Vpn {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
}

impl Vpn {
    /// With the key that it takes, in clear or within TLS.
    pub fn start(key: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        Self::serve(ANYWHERE, Some(key.to_owned()), tls, |_| None)
    }

    /// In clear, at this address.
    pub fn start_at(addr: SocketAddr, key: &str) -> Self {
        Self::serve(addr, Some(key.to_owned()), None, |_| None)
    }

    /// In clear, with more devices than those that it is told of.
    pub fn start_with(key: &str, others: impl Fn(&str) -> Option<Device> + Send + Sync + 'static) -> Self {
        Self::start_with_at(ANYWHERE, key, others)
    }

    pub fn start_with_at(
        addr: SocketAddr, key: &str, others: impl Fn(&str) -> Option<Device> + Send + Sync + 'static,
    ) -> Self {
        Self::serve(addr, Some(key.to_owned()), None, others)
    }

    /// A proxy between here and the internet.
    pub fn proxy() -> Self {
        Self::serve(ANYWHERE, None, None, |_| None)
    }

    fn serve(
        addr: SocketAddr, key: Option<String>, tls: Option<Arc<ServerConfig>>,
        others: impl Fn(&str) -> Option<Device> + Send + Sync + 'static,
    ) -> Self {
        let (devices, requests) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { key, devices, others: Box::new(others), requests });
        let listener = std::net::TcpListener::bind(addr).expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let addr = listener.local_addr().expect("an address");
        let (serving, tls) = (shared.clone(), tls.map(TlsAcceptor::from));
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a socket");
                while let Ok((stream, _)) = listener.accept().await {
                    let _ = stream.set_nodelay(true); // it may be slower without
                    let (shared, tls) = (serving.clone(), tls.clone());
                    tokio::spawn(async move {
                        let stream: Stream = match tls {
                            None => Box::new(stream),
                            Some(tls) => Box::new(tls.accept(stream).await?),
                        };
                        shared.answer(stream).await
                    });
                }
            });
        });
        Vpn { addr, shared }
    }

    /// By its uuid; of a proxy of somebody else's, by its name.
    pub fn device(&self, name: &str, edit: impl FnOnce(&mut Device)) {
        edit(self.shared.devices.lock().unwrap().entry(name.to_owned()).or_default());
    }

    /// What `--tunnel-url` takes, without TLS.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The heads of all requests.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub fn clear_requests(&self) {
        self.shared.requests.lock().unwrap().clear();
    }
}

impl Shared {
    async fn answer(&self, mut client: Stream) -> io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await?);
        }
        let head = String::from_utf8(head).map_err(io::Error::other)?;
        self.requests.lock().unwrap().push(head.clone());
        match self.find(&head) {
            Ok(backend) => match TcpStream::connect(backend).await {
                Ok(device) => relay(client, device).await,
                Err(_) => refuse(client, NO_PORT).await,
            },
            Err(Some(refusal)) => refuse(client, refusal).await,
            Err(None) => {
                tokio::time::sleep(Duration::from_secs(134)).await;
                refuse(client, NO_PORT).await
            }
        }
    }

    /// Where it leads, or what is said instead; nothing for a device that swallows packets.
    fn find(&self, head: &str) -> Result<SocketAddr, Option<&'static str>> {
        let mut lines = head.lines();
        let words: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
        let &[method, target, _] = &words[..] else { return Err(Some(NO_HTTP)) };
        if method != "CONNECT" {
            return Err(Some(NO_CONNECT));
        }
        let (host, port) = target.split_once(':').ok_or(NO_DEVICE)?;
        let mut name = host;
        if let Some(key) = &self.key {
            let suffix = [".balena", ".vpn", ".resin"].iter().find_map(|suffix| host.strip_suffix(suffix));
            let hex = |name: &&str| name.bytes().all(|byte| byte.is_ascii_hexdigit());
            name = suffix.filter(hex).ok_or(NO_DEVICE)?;
            let user = lines.find_map(|line| {
                let (header, value) = line.split_once(':')?;
                header.eq_ignore_ascii_case("proxy-authorization").then(|| value.trim())
            });
            if user == Some("Basic") {
                return Err(Some(""));
            }
            let user = user.and_then(|user| BASE64_STANDARD.decode(user.strip_prefix("Basic ")?).ok());
            let user = user.and_then(|user| String::from_utf8(user).ok()).unwrap_or_default();
            user.split_once(':').filter(|(_, given)| given == key).ok_or(NO_ACCESS)?;
        }
        let device = self.devices.lock().unwrap().get(name).cloned();
        let device = device.or_else(|| (self.others)(name)).ok_or(NO_ACCESS)?;
        match device {
            Device { offline: true, .. } => Err(Some(NOT_CONNECTED)),
            Device { silent: true, .. } => Err(None),
            Device { ports, .. } => {
                let backend = port.parse().ok().and_then(|port: u16| ports.get(&port).copied());
                Ok(backend.ok_or(NO_PORT)?)
            }
        }
    }
}

/// It only half-closes, and waits for the client to do so too.
async fn refuse(mut client: Stream, answer: &str) -> io::Result<()> {
    client.write_all(answer.as_bytes()).await?;
    client.shutdown().await?;
    client.read_to_end(&mut Vec::new()).await.map(drop)
}

/// Whoever ends first ends it all: a client that half-closes loses the answer.
async fn relay(mut client: Stream, device: TcpStream) -> io::Result<()> {
    device.set_nodelay(true)?;
    client.write_all(ESTABLISHED.as_bytes()).await?;
    client.flush().await?;
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_device, mut to_device) = device.into_split();
    let mut ways = JoinSet::new();
    ways.spawn(async move { tokio::io::copy(&mut from_client, &mut to_device).await });
    ways.spawn(async move { tokio::io::copy(&mut from_device, &mut to_client).await });
    ways.join_next().await;
    Ok(())
}

//! Ports that are known before somebody listens on them.

use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

/// A port that the system gives to nobody else meanwhile. It is closed, until a server that reuses addresses listens on it.
pub struct Reserved(Socket);

impl Reserved {
    pub fn any() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("a socket");
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into()).expect("a free port");
        Self(socket)
    }

    pub fn number(&self) -> u16 {
        self.0.local_addr().expect("its address").as_socket().expect("its address").port()
    }
}

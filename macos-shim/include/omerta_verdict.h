/*
 * Omerta's packet verdict for C and Swift: the same judgement that the kernel programs make, over a frame in memory.
 * Link with libomerta_macos_shim.a. Functions keep no state between calls; one guard may be used from many threads.
 */
#ifndef OMERTA_VERDICT_H
#define OMERTA_VERDICT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Longest answer that a guard gives, in bytes. */
#define OMERTA_ANSWER_CAPACITY 86

/* Seen from the guest: egress is what it sends. */
#define OMERTA_EGRESS 0
#define OMERTA_INGRESS 1

/* IP protocol numbers that an endpoint may have. */
#define OMERTA_ICMP 1
#define OMERTA_TCP 6
#define OMERTA_UDP 17

/* Outcomes of omerta_decide. Any other outcome that is not negative is a drop: see omerta_outcome_word. */
#define OMERTA_INVALID (-1)
#define OMERTA_ALLOWED 0
#define OMERTA_ANSWERED 1

/* family is 4 or 6; the octets are in network order, four of them for family 4. */
struct omerta_address {
    uint8_t family;
    uint8_t octets[16];
};

/* port is in host order, and 0 for OMERTA_ICMP. */
struct omerta_endpoint {
    struct omerta_address address;
    uint8_t protocol;
    uint16_t port;
};

/* Up to 8 addresses, and up to one gateway a family. Everything is copied. */
struct omerta_policy {
    uint8_t mac[6];
    uint8_t gateway_mac[6];
    const struct omerta_address *addresses;
    size_t address_count;
    const struct omerta_address *gateways;
    size_t gateway_count;
    const struct omerta_endpoint *allow;
    size_t allow_count;
};

struct omerta_guard;

/* A guard in filtered mode, or NULL where the policy is not valid. Free it with omerta_guard_free. */
struct omerta_guard *omerta_guard_new(const struct omerta_policy *policy);

/* NULL is ignored. */
void omerta_guard_free(struct omerta_guard *guard);

/*
 * Judges one Ethernet frame. Where the outcome is OMERTA_ANSWERED, *answer_length bytes of answer are the frame to
 * send back the way this one came; otherwise *answer_length is 0. OMERTA_INVALID where an argument is.
 */
int omerta_decide(const struct omerta_guard *guard, int direction, const uint8_t *frame, size_t frame_length,
                  uint8_t answer[OMERTA_ANSWER_CAPACITY], size_t *answer_length);

/* "allowed", "answered", or the reason of a drop in one word ("endpoint"); NULL where there is no such outcome. */
const char *omerta_outcome_word(int outcome);

#ifdef __cplusplus
}
#endif

#endif

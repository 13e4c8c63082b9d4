/* Places of calls in the code (module_sites.c). */
#ifndef COMMGRAPH_MODULE_SITES_H
#define COMMGRAPH_MODULE_SITES_H

#include "module.h"

typedef struct Recorder Recorder;

enum { SITES = 1024, USUAL = 256, DEPTHS = 16 };

/* Place of a call in the code, by code object and index of its instruction, or the kind of the code. */
typedef struct {
    PyObject *code; /* a reference, so that no other code takes its address */
    long lasti;
    uint32_t site;
} known_site;

typedef struct {
    PyObject *site_of_job; /* () -> str or None: where a job of another thread was begun */
    PyObject *operations;  /* tuple of what the files begin with whose code is of operations */
    PyObject *ours;        /* likewise of other code that is not the user's */
    PyObject *getframe;    /* sys._getframe */
    PyObject *depths[DEPTHS]; /* numbers from 0 */
    PyObject *f_back, *f_lasti, *co_filename, *co_qualname; /* names, interned */
    uint64_t thread; /* that is none of a lane: it has no jobs */
    unsigned char usual[USUAL]; /* frames of an operation, innermost first, by its name; 0: not known */
    known_site known[SITES];
} call_sites;

/* 0 with an error set. */
int begin_sites(call_sites *sites, PyObject *site_of_job, PyObject *operations, PyObject *ours, uint64_t thread);
void end_sites(call_sites *sites);
/* The number of the text about the innermost caller outside of commgraph, 0 if there is none; texts are added to the recorder. `thread`: this
 * one. `operation`: number of the text that is its name. */
uint32_t find_site(call_sites *sites, Recorder *recorder, uint64_t thread, uint16_t operation);

#endif
